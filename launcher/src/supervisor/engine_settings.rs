//! What the engine is started with: the host's proxies and certificates, the VM's registries.

use super::network::host_of;
use crate::config::Config;
use crate::error::say;
use crate::vm::Settings;
use lighter_protocol::agent::EngineSettings;
use lighter_protocol::names::HOST;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

/// Where the distributions keep the certificates of those that they trust, in the order in which Go's library looks.
const BUNDLES: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The longest bundle that is passed on, bytes: what fits into a message beside the rest.
const MAX_BUNDLE: u64 = 900 << 10;

/// Those for the engine of a VM of `settings`.
pub fn of(settings: &Settings, config: &Config) -> EngineSettings {
    EngineSettings {
        proxies: proxies(settings, config),
        certificates: certificates(std::env::var_os("SSL_CERT_FILE").map(PathBuf::from)),
        registry_mirrors: texts(&settings.registry_mirrors),
        insecure_registries: texts(&settings.insecure_registries),
    }
}

fn texts(of: &[impl ToString]) -> Vec<String> {
    of.iter().map(ToString::to_string).collect()
}

/// The host's certificates: those of `chosen`, else of the first bundle that there is.
fn certificates(chosen: Option<PathBuf>) -> String {
    let bundle = chosen
        .into_iter()
        .chain(BUNDLES.map(PathBuf::from))
        .find(|path| path.exists());
    let Some(bundle) = bundle else {
        return String::new();
    };
    let read = || {
        let length = std::fs::metadata(&bundle)?.len();
        if length > MAX_BUNDLE {
            let message = format!("it has {length} bytes, and at most {MAX_BUNDLE} are passed on");
            return Err(std::io::Error::other(message));
        }
        std::fs::read_to_string(&bundle)
    };
    read().unwrap_or_else(|error| {
        say(format_args!(
            "lighter: the engine does not get the host's certificates: {}: {error}",
            bundle.display()
        ));
        String::new()
    })
}

/// The proxies of the engine, of builds and of containers, as a guest of `settings` reaches them: those of the configuration, else of
/// the environment.
pub fn proxies(settings: &Settings, config: &Config) -> BTreeMap<String, String> {
    let variable = |name: &str| std::env::var(name).ok();
    of_host(config, variable, host_of(settings).is_some())
}

fn of_host(
    config: &Config,
    variable: impl Fn(&str) -> Option<String>,
    host_access: bool,
) -> BTreeMap<String, String> {
    let get = |name: &str, configured: &Option<String>| {
        // Small letters win, as with curl.
        let environment = || {
            [name.to_lowercase(), name.into()]
                .iter()
                .find_map(|name| said(variable(name)))
        };
        match configured {
            Some(value) => said(Some(value.clone())),
            None => environment(),
        }
    };
    let mut proxies: BTreeMap<String, String> = [
        ("HTTP_PROXY", &config.http_proxy),
        ("HTTPS_PROXY", &config.https_proxy),
    ]
    .into_iter()
    .filter_map(|(name, configured)| {
        Some((
            name.into(),
            seen_from_the_guest(&get(name, configured)?, host_access),
        ))
    })
    .collect();
    if !proxies.is_empty() {
        let exceptions = get("NO_PROXY", &config.no_proxy);
        let exceptions = exceptions.into_iter().chain(HOST.map(Into::into));
        proxies.insert("NO_PROXY".into(), exceptions.collect::<Vec<_>>().join(","));
    }
    proxies
}

fn said(value: Option<String>) -> Option<String> {
    value.filter(|value| !value.trim().is_empty())
}

/// A proxy on the host's loopback interface has another name in the guest.
fn seen_from_the_guest(proxy: &str, host_access: bool) -> String {
    let start = proxy.find("://").map_or(0, |at| at + 3);
    let end = proxy[start..].find('/').map_or(proxy.len(), |at| start + at);
    let start = proxy[start..end].rfind('@').map_or(start, |at| start + at + 1);
    let authority = &proxy[start..end];
    let host_end = match authority.rfind(']') {
        Some(bracket) => bracket + 1,
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let host = &authority[..host_end];
    let address = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    let is_loopback =
        host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback());
    if !(is_loopback && host_access) {
        return proxy.into();
    }
    [&proxy[..start], HOST[0], &proxy[start + host_end..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_on_the_loopback_interface_is_the_hosts() {
        for (on_host, in_guest) in [
            ("http://localhost:3128", "http://host.docker.internal:3128"),
            (
                "http://user:p@ss@127.0.0.1:1/",
                "http://user:p@ss@host.docker.internal:1/",
            ),
            ("http://[::1]:3128", "http://host.docker.internal:3128"),
            ("127.0.0.1:3128", "host.docker.internal:3128"),
            ("http://proxy.example.com:3128", "http://proxy.example.com:3128"),
            ("socks5://10.0.0.1", "socks5://10.0.0.1"),
            ("", ""),
        ] {
            assert_eq!(seen_from_the_guest(on_host, true), in_guest);
            assert_eq!(seen_from_the_guest(on_host, false), on_host);
        }
    }

    fn pairs(proxies: &BTreeMap<String, String>) -> Vec<(&str, &str)> {
        let pairs = proxies.iter();
        pairs
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect()
    }

    fn environment(name: &str) -> Option<String> {
        match name {
            "https_proxy" => Some("http://p:1".into()),
            "HTTPS_PROXY" => Some("http://other:1".into()),
            "no_proxy" => Some(".corp".into()),
            "HTTP_PROXY" => Some(" ".into()),
            _ => None,
        }
    }

    #[test]
    fn the_environment_says_which_proxies_there_are() {
        let config = Config::default();
        let none = of_host(&config, |name| (name == "NO_PROXY").then(|| "a".into()), true);
        assert!(none.is_empty());
        assert_eq!(
            pairs(&of_host(&config, environment, true)),
            [
                ("HTTPS_PROXY", "http://p:1"),
                ("NO_PROXY", ".corp,host.docker.internal,gateway.docker.internal")
            ]
        );
    }

    #[test]
    fn the_configuration_wins_over_the_environment_and_may_say_that_there_is_none() {
        let config = |http: &str, https: &str| Config {
            http_proxy: Some(http.into()),
            https_proxy: Some(https.into()),
            no_proxy: Some("b".into()),
            ..Config::default()
        };
        assert_eq!(
            pairs(&of_host(&config("http://localhost:3128", ""), environment, true)),
            [
                ("HTTP_PROXY", "http://host.docker.internal:3128"),
                ("NO_PROXY", "b,host.docker.internal,gateway.docker.internal")
            ]
        );
        assert!(of_host(&config("", ""), environment, true).is_empty());
    }

    #[test]
    fn a_bundle_is_passed_on_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "-----BEGIN CERTIFICATE-----\n").unwrap();
        let chosen = certificates(Some(file.path().into()));
        assert_eq!(chosen, "-----BEGIN CERTIFICATE-----\n");
        file.as_file().set_len(MAX_BUNDLE + 1).unwrap();
        assert_eq!(certificates(Some(file.path().into())), "");
    }
}
