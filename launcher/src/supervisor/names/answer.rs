//! What a question gets: messages of RFC 1035, parsed and built by `hickory-proto`.

use hickory_proto::op::{DEFAULT_MAX_PAYLOAD_LEN, Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType};
use lighter_protocol::names::{HEADER, HOST};
use std::net::{IpAddr, Ipv4Addr};

/// How long an answer may be kept, seconds: what the host changes is to be seen soon. The host's own caches know the
/// records' real lives.
const TTL_S: u32 = 5;

/// Which addresses are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A records.
    V4,
    /// AAAA records.
    V6,
}

impl Family {
    /// As the system numbers it.
    pub fn number(self) -> i32 {
        match self {
            Self::V4 => rustix::net::AddressFamily::INET,
            Self::V6 => rustix::net::AddressFamily::INET6,
        }
        .as_raw()
        .into()
    }
}

/// What the system's resolver said.
#[derive(Debug, PartialEq, Eq)]
pub enum Addresses {
    /// There is such a name, with these addresses of the family.
    Found(Vec<IpAddr>),
    /// There is no such name.
    NoSuchName,
    /// It does not know at present.
    Unknown,
}

/// How to get on with a question.
#[derive(Debug)]
pub enum Step {
    /// It is too short to be answered at all, or no question.
    Nothing,
    /// This is the answer.
    Answer(Vec<u8>),
    /// The system's resolver is to be asked for the addresses of `name`.
    Lookup {
        /// The question.
        query: Box<Message>,
        /// Without the dot at its end.
        name: String,
        /// Which addresses.
        family: Family,
    },
    /// The host's name servers are to be asked.
    Ask,
}

/// Looks at a question. `host` is the address of the host's own names, if the guest may reach it.
pub fn first_step(question: &[u8], host: Option<Ipv4Addr>) -> Step {
    let Ok(message) = Message::from_vec(question) else {
        return error(question, ResponseCode::FormErr).map_or(Step::Nothing, Step::Answer);
    };
    let refuse = |code| error(question, code).map_or(Step::Nothing, Step::Answer);
    if message.metadata.message_type != MessageType::Query {
        return Step::Nothing;
    }
    if message.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let [query] = message.queries.as_slice() else {
        return refuse(ResponseCode::FormErr);
    };
    let name = query.name().to_ascii();
    let name = name.trim_end_matches('.').to_owned();
    let own = query.query_class() == DNSClass::IN && HOST.iter().any(|host| name.eq_ignore_ascii_case(host));
    if own {
        let addresses = match host {
            Some(address) if query.query_type() == RecordType::A => Addresses::Found(vec![address.into()]),
            Some(_) => Addresses::Found(vec![]),
            None => Addresses::NoSuchName,
        };
        return Step::Answer(of_addresses(&message, addresses));
    }
    match family(query).filter(|_| is_host_name(&name)) {
        Some(family) => Step::Lookup {
            name,
            family,
            query: Box::new(message),
        },
        None => Step::Ask,
    }
}

fn family(query: &Query) -> Option<Family> {
    match (query.query_class(), query.query_type()) {
        (DNSClass::IN, RecordType::A) => Some(Family::V4),
        (DNSClass::IN, RecordType::AAAA) => Some(Family::V6),
        _ => None,
    }
}

/// Whether the system's resolver takes `name` for what it is: it would read some as addresses.
fn is_host_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let last = name.rsplit('.').next().unwrap_or_default();
    name.bytes().all(plain) && last.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
}

/// The answer to `question` when the system's resolver said `addresses`.
pub fn of_addresses(question: &Message, addresses: Addresses) -> Vec<u8> {
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    answer.metadata.recursion_desired = question.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.add_queries(question.queries.iter().cloned());
    if question.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(DEFAULT_MAX_PAYLOAD_LEN);
        answer.set_edns(edns);
    }
    match addresses {
        Addresses::NoSuchName => answer.metadata.response_code = ResponseCode::NXDomain,
        Addresses::Unknown => answer.metadata.response_code = ResponseCode::ServFail,
        Addresses::Found(addresses) => {
            let name = question
                .queries
                .first()
                .map(Query::name)
                .cloned()
                .unwrap_or_default();
            answer.add_answers(addresses.into_iter().map(|address| {
                let data = match address {
                    IpAddr::V4(address) => RData::A(address.into()),
                    IpAddr::V6(address) => RData::AAAA(address.into()),
                };
                Record::from_rdata(name.clone(), TTL_S, data)
            }));
        }
    }
    // What was parsed can be written.
    answer.to_vec().unwrap_or_default()
}

/// The answer when nobody knows one.
pub fn failure(question: &[u8]) -> Vec<u8> {
    error(question, ResponseCode::ServFail).unwrap_or_default()
}

/// `answer`, or a message that bids the client ask again over TCP when it is longer than the client of `question` takes in a
/// datagram.
pub fn fitting(question: &[u8], answer: Vec<u8>) -> Vec<u8> {
    let longest = Message::from_vec(question).map_or(512, |question| question.max_payload());
    if answer.len() <= longest.into() {
        return answer;
    }
    let cut = Message::from_vec(&answer)
        .ok()
        .and_then(|answer| answer.truncate().to_vec().ok());
    cut.unwrap_or_else(|| failure(question))
}

/// A refusal of whatever `question` is, if it has a header.
fn error(question: &[u8], code: ResponseCode) -> Option<Vec<u8>> {
    let header = question.get(..HEADER)?;
    // The bit says that it is an answer, and answers are not answered.
    let is_question = header[2] & 0x80 == 0;
    let id = u16::from_be_bytes([header[0], header[1]]);
    let op_code = OpCode::from_u8((header[2] >> 3) & 0xf);
    is_question
        .then(|| Message::error_msg(id, op_code, code).to_vec().ok())
        .flatten()
}

#[cfg(test)]
pub mod testing {
    use super::*;

    /// A question as clients send it.
    pub fn question(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 77;
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(name.parse().unwrap(), kind));
        message.to_vec().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::question;
    use super::*;
    use proptest::prelude::*;

    fn answered(step: Step) -> Message {
        match step {
            Step::Answer(answer) => Message::from_vec(&answer).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn addresses_of_names_are_looked_up_and_the_rest_is_asked_for() {
        let mut question_in_capitals = question("example.com.", RecordType::AAAA);
        question_in_capitals[HEADER + 1] = b'E';
        let step = first_step(&question_in_capitals, None);
        let Step::Lookup { name, family, query } = step else {
            panic!("{step:?}");
        };
        assert_eq!((name.as_str(), family), ("Example.com", Family::V6));
        let found = Addresses::Found(vec!["2001:db8::1".parse().unwrap()]);
        let answer = Message::from_vec(&of_addresses(&query, found)).unwrap();
        assert_eq!(answer.metadata.id, 77);
        // A client may have chosen the letters' case, to know the answer again.
        assert_eq!(answer.answers[0].name.to_ascii(), "Example.com.");
        assert_eq!(answer.answers[0].ttl, TTL_S);
        for (name, kind) in [
            ("example.com.", RecordType::TXT),
            ("1.0.0.127.in-addr.arpa.", RecordType::PTR),
            // The system would take these for addresses.
            ("127.1.", RecordType::A),
            ("0x7f000001.", RecordType::A),
            (".", RecordType::A),
        ] {
            assert!(
                matches!(first_step(&question(name, kind), None), Step::Ask),
                "{name}"
            );
        }
    }

    #[test]
    fn without_access_to_the_host_its_names_do_not_exist() {
        let answer = answered(first_step(
            &question("host.docker.internal.", RecordType::A),
            None,
        ));
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }

    #[test]
    fn errors_are_told_apart() {
        let Step::Lookup { query, .. } = first_step(&question("a.test.", RecordType::A), None) else {
            panic!("it is to be looked up");
        };
        let code = |addresses| {
            let answer = Message::from_vec(&of_addresses(&query, addresses)).unwrap();
            assert!(answer.answers.is_empty());
            answer.metadata.response_code
        };
        assert_eq!(code(Addresses::NoSuchName), ResponseCode::NXDomain);
        assert_eq!(code(Addresses::Unknown), ResponseCode::ServFail);
        assert_eq!(code(Addresses::Found(vec![])), ResponseCode::NoError);
    }

    #[test]
    fn what_is_no_question_gets_no_answer() {
        let mut reply = question("a.test.", RecordType::A);
        reply[2] |= 0x80;
        assert!(matches!(first_step(&reply, None), Step::Nothing));
        assert!(matches!(first_step(&[0; 11], None), Step::Nothing));
        let mut update = question("a.test.", RecordType::A);
        update[2] |= 2 << 3;
        let refused = answered(first_step(&update, None));
        assert_eq!(refused.metadata.response_code, ResponseCode::NotImp);
    }

    #[test]
    fn an_answer_too_long_for_a_datagram_is_asked_for_again() {
        let question = question("a.test.", RecordType::A);
        let Step::Lookup { query, .. } = first_step(&question, None) else {
            panic!("it is to be looked up");
        };
        let many = Addresses::Found(vec![Ipv4Addr::LOCALHOST.into(); 60]);
        let answer = of_addresses(&query, many);
        assert!(answer.len() > 512);
        let cut = fitting(&question, answer.clone());
        assert!(cut.len() <= 512);
        let cut = Message::from_vec(&cut).unwrap();
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        let mut large = Message::from_vec(&question).unwrap();
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        large.set_edns(edns);
        assert_eq!(fitting(&large.to_vec().unwrap(), answer.clone()), answer);
    }

    proptest! {
        #[test]
        fn no_bytes_of_the_guest_break_it(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Step::Answer(answer) = first_step(&bytes, None) {
                prop_assert_eq!(&answer[..2], &bytes[..2]);
            }
            fitting(&bytes, bytes.clone());
        }
    }
}
