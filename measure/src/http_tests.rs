use super::*;
use proptest::prelude::*;
use std::io::Read;

/// Asks a server that answers with `answer`, in pieces of `size`, and closes. Returns the body.
fn ask_in_pieces(answer: &[u8], size: usize, limit: u64) -> Result<Vec<u8>, Error> {
    let (client, mut server) = UnixStream::pair().unwrap();
    let answer = answer.to_vec();
    let serving = std::thread::spawn(move || {
        for piece in answer.chunks(size) {
            // The client may have given up.
            if server.write_all(piece).is_err() {
                break;
            }
        }
        server
    });
    let mut body = vec![];
    let mut connection = Connection::over(client, PATIENCE).unwrap();
    // Closes after the last piece: dropped with the thread's result.
    let closing = std::thread::spawn(move || {
        let server = serving.join().unwrap();
        server.shutdown(std::net::Shutdown::Write).unwrap();
        server
    });
    let result = connection.request("GET /x", None, limit, &mut |bytes| body.extend_from_slice(bytes));
    drop(connection);
    closing.join().unwrap();
    let length = result?;
    assert_eq!(length, body.len() as u64);
    Ok(body)
}

fn ask(answer: &str) -> Result<Vec<u8>, Error> {
    ask_in_pieces(answer.as_bytes(), usize::MAX, 100)
}

#[test]
fn bodies_end_where_their_framing_says_however_they_are_cut() {
    for answer in [
        "HTTP/1.1 200 OK\r\ncontent-LENGTH: 5\r\n\r\nhellono more",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nT: 1\r\n\r\nno more",
        "HTTP/1.1 200 OK\r\nServer: x\r\n\r\nhello",
    ] {
        for size in 1..answer.len() {
            assert_eq!(
                ask_in_pieces(answer.as_bytes(), size, 5).unwrap(),
                b"hello",
                "{answer:?}"
            );
        }
    }
    assert_eq!(ask("HTTP/1.1 204 No Content\r\n\r\n").unwrap(), b"");
}

#[test]
fn a_connection_serves_one_request_after_another() {
    let (client, mut server) = UnixStream::pair().unwrap();
    let mut connection = Connection::over(client, PATIENCE).unwrap();
    let mut last = vec![];
    for number in 0..3 {
        let body = number.to_string();
        server
            .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{body}").as_bytes())
            .unwrap();
        let ask = connection.request("GET /x", None, 1, &mut |bytes| last = bytes.to_vec());
        assert_eq!((ask.unwrap(), &last), (1, &body.into_bytes()));
    }
    let write = |out: &mut dyn Write| out.write_all(b"body");
    let body = Body {
        kind: "application/x-tar",
        length: 4,
        write: &write,
    };
    server
        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        .unwrap();
    connection
        .request("POST /y", Some(body), 0, &mut |_| panic!("there is no body"))
        .unwrap();
    drop(connection);
    let mut sent = String::new();
    server.read_to_string(&mut sent).unwrap();
    let head = "HTTP/1.1\r\nHost: lighter\r\n";
    let get = format!("GET /x {head}\r\n");
    let post = format!("POST /y {head}Content-Type: application/x-tar\r\nContent-Length: 4\r\n\r\nbody");
    assert_eq!(sent, get.repeat(3) + &post);
}

#[test]
fn a_refusal_is_told_with_its_reason_even_when_the_body_was_not_taken() {
    let (client, mut server) = UnixStream::pair().unwrap();
    let answer = format!(
        "HTTP/1.1 507 Full\r\nContent-Length: {}\r\n\r\nno space left{}",
        1 << 20,
        "!".repeat(2000)
    );
    server.write_all(answer.as_bytes()).unwrap();
    drop(server);
    let mut connection = Connection::over(client, PATIENCE).unwrap();
    let write = |out: &mut dyn Write| out.write_all(b"body");
    let body = Body {
        kind: "application/x-tar",
        length: 4,
        write: &write,
    };
    let error = connection.request("POST /y", Some(body), 0, &mut |_| panic!("no success"));
    let Err(Error::Refused { request, status, .. }) = error else {
        panic!("{error:?}")
    };
    assert_eq!((request.as_str(), status), ("POST /y", 507));
    let error = ask("HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\nno x\n").unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"the engine refused "GET /x" with status 404: "no x""#
    );
}

#[test]
fn nonsense_is_refused() {
    for (answer, what) in [
        ("SSH-2.0-x\r\n\r\n", "begin with HTTP/1.1"),
        ("HTTP/1.1 +20\r\n\r\n", "begin with HTTP/1.1"),
        ("HTTP/1.1 200 OK\r\nx\r\n\r\n", "no colon"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "no number"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
            "two lengths",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
            "transfer encoding",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            "no size",
        ),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
            "longer than it said",
        ),
    ] {
        let error = ask(answer).unwrap_err();
        assert!(error.to_string().contains(what), "{answer:?}: {error}");
    }
    for cut in [
        "",
        "HTTP/1.1 200",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx",
    ] {
        assert!(matches!(ask(cut), Err(Error::Receive(..))), "{cut:?}");
    }
}

#[test]
fn endless_answers_are_cut() {
    let head = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(1 << 20));
    assert!(matches!(ask(&head), Err(Error::Malformed(..))));
    let headers = format!("HTTP/1.1 200 OK\r\n{}", "X: y\r\n".repeat(1 << 17));
    assert!(matches!(ask(&headers), Err(Error::Malformed(..))));
    for body in [
        "Content-Length: 101\r\n\r\n".to_owned(),
        "Transfer-Encoding: chunked\r\n\r\n64\r\n".to_owned() + &"x".repeat(100) + "\r\n1\r\n",
        "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n".to_owned(),
        "\r\n".to_owned() + &"x".repeat(101),
    ] {
        let error = ask(&format!("HTTP/1.1 200 OK\r\n{body}"));
        assert!(matches!(error, Err(Error::TooLong(..))), "{error:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_heads_never_panic(text in "(HTTP/1.1 )?[ -~\r\n]{0,100}") {
        let _ = parse_head(&text);
    }

    #[test]
    fn arbitrary_answers_never_panic_and_end(rest in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        answer.extend(rest);
        let _ = ask_in_pieces(&answer, 50, 1000);
    }
}
