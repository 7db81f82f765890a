//! The boot report in a real browser: Debian's `chromium-headless-shell`, on this host.
//!
//! `LIGHTER_TEST_PAGE` names the page; `scripts/test` makes one and runs this.

mod chromium;

use chromium::{Browser, Look};
use serde_json::{Value, json};

const WIDE: Look = Look {
    width: 1000,
    dark: false,
    print: false,
};

fn page() -> String {
    let path =
        std::env::var("LIGHTER_TEST_PAGE").expect("LIGHTER_TEST_PAGE names the page; run scripts/test");
    assert!(path.starts_with('/'), "{path} is not absolute");
    format!("file://{path}")
}

/// What is to be known of the page as it is shown.
const SEEN: &str = r#"(() => {
    const style = element => getComputedStyle(element);
    const plots = [...document.querySelectorAll("svg")].filter(plot => plot.checkVisibility());
    const text = plots[0].querySelector("text");
    return {
        background: style(document.body).backgroundColor,
        ink: style(document.body).color,
        plotText: style(text).fill,
        bar: style(plots[0].querySelector("rect")).fill,
        pageWidth: document.documentElement.scrollWidth,
        windowWidth: document.documentElement.clientWidth,
        plots: plots.map(plot => {
            const box = plot.getBoundingClientRect();
            return [box.left, box.right, box.width, box.height];
        }),
        outside: plots.flatMap(plot => {
            const frame = plot.getBoundingClientRect();
            return [...plot.querySelectorAll("text")].filter(text => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1 || box.width === 0;
            }).map(text => text.textContent);
        }),
        textHeight: text.getBoundingClientRect().height,
        title: document.title,
    };
})()"#;

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// A colour's lightness, 0 to 765.
fn lightness(color: &Value) -> u32 {
    let color = color.as_str().expect("a colour");
    let parts = color
        .split(|c: char| !c.is_ascii_digit())
        .filter(|part| !part.is_empty());
    parts
        .take(3)
        .map(|part| part.parse::<u32>().expect("a number"))
        .sum()
}

fn assert_shown(seen: &Value) {
    assert_eq!(seen["title"], "Lighter: cold boot");
    assert!(
        number(&seen["pageWidth"]) <= number(&seen["windowWidth"]),
        "wider than the window: {seen}"
    );
    assert_eq!(seen["outside"], json!([]), "text outside of its plot: {seen}");
    let plots = seen["plots"].as_array().expect("plots");
    assert!(plots.len() >= 3, "{seen}");
    for plot in plots {
        let [left, right, width, height] = [0, 1, 2, 3].map(|index| number(&plot[index]));
        assert!(width > 250.0 && height > 250.0, "{seen}");
        assert!(left >= 0.0 && right <= number(&seen["windowWidth"]), "{seen}");
    }
    assert!(number(&seen["textHeight"]) >= 10.0, "too small to read: {seen}");
}

#[test]
fn the_report_is_shown_in_light_and_dark_wide_and_narrow_and_asks_nobody() {
    let mut browser = Browser::start();
    let light = browser.look(&page(), WIDE, SEEN);
    assert_shown(&light);
    let dark = browser.look(&page(), Look { dark: true, ..WIDE }, SEEN);
    assert_shown(&dark);
    for (of, light_is_lighter) in [("background", true), ("ink", false), ("plotText", false)] {
        let (in_light, in_dark) = (lightness(&light[of]), lightness(&dark[of]));
        assert_eq!(in_light > in_dark, light_is_lighter, "{of}: {light} {dark}");
        assert!(in_light.abs_diff(in_dark) > 300, "{of}: {light} {dark}");
    }
    assert_ne!(light["bar"], dark["bar"]);
    for dark in [false, true] {
        let narrow = Look {
            width: 360,
            dark,
            ..WIDE
        };
        assert_shown(&browser.look(&page(), narrow, SEEN));
    }
    assert_eq!(browser.complaints(), [""; 0]);
    let asked = browser.asked();
    assert!(
        !asked.is_empty() && asked.iter().all(|url| *url == page()),
        "{asked:?}"
    );
}

#[test]
fn the_report_is_printed_dark_on_light_with_the_wide_plots() {
    let mut browser = Browser::start();
    let paper = Look {
        dark: true,
        print: true,
        width: 700,
    };
    let printed = browser.look(&page(), paper, SEEN);
    assert!(lightness(&printed["background"]) > 700, "{printed}");
    assert!(lightness(&printed["plotText"]) < 200, "{printed}");
    // The narrow ones are not half as wide.
    assert!(number(&printed["plots"][0][2]) > 650.0, "{printed}");
    assert!(browser.pdf_length() > 10_000);
}

#[test]
fn a_page_that_complains_and_asks_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad.html");
    let bad = "<!DOCTYPE html><title>x</title><script>console.error('broken'); nothing()</script><img src='missing.png'>";
    std::fs::write(&path, bad).expect("a page");
    let mut browser = Browser::start();
    let url = format!("file://{}", path.display());
    assert_eq!(browser.look(&url, WIDE, "document.title"), "x");
    let complaints = browser.complaints();
    assert!(
        complaints.iter().any(|text| text.contains("broken")),
        "{complaints:?}"
    );
    assert!(
        complaints.iter().any(|text| text.contains("nothing")),
        "{complaints:?}"
    );
    assert!(browser.asked().iter().any(|url| url.ends_with("missing.png")));
}
