//! The report as one page that needs nothing else: no network, no script.

use super::charts::{self, Drawn, time_text};
use super::comparison::{Comparison, ratio_text};
use super::phases::{Milestone, PHASES, START, median_run};
use super::report::{HEADER, Report, spread_text};
use super::stats::Spread;
use crate::clock::rfc3339;
use crate::error::{Context, Error, Result};
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Width of the plots on a wide screen and on paper, and on a narrow screen, CSS pixels.
const WIDTHS: [(&str, u32); 2] = [("wide", 860), ("narrow", 336)];

/// A page to be, made beforehand so that a path that cannot be written is told before the boots. Until then whatever is at
/// the path stays.
#[derive(Debug)]
pub struct PageFile {
    path: PathBuf,
    file: NamedTempFile,
}

impl PageFile {
    /// Makes the file beside `path`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(path: &Path) -> Result<Self> {
        let failed = || format!("cannot write the report {}", path.display());
        let path = std::path::absolute(path).context(failed)?;
        if path.is_dir() {
            return Err(Error::failure(format!("{}: it is a folder", failed())));
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        let file = tempfile::Builder::new()
            .prefix(".lighter-report-")
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(folder)
            .context(failed)?;
        Ok(Self { path, file })
    }

    /// Writes it, and puts it to its path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(mut self, report: &Report) -> Result<()> {
        let failed = || format!("cannot write the report {}", self.path.display());
        let page =
            page(report).map_err(|error| Error::failure(format!("cannot draw the report: {error}")))?;
        self.file.write_all(page.as_bytes()).context(failed)?;
        match self.file.persist(&self.path) {
            Ok(_) => Ok(()),
            Err(error) => Err(error.error).context(failed),
        }
    }
}

/// The page.
fn page(report: &Report) -> Drawn<String> {
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Lighter: cold boot</title>\n<style>\n{}</style>\n</head>\n<body>\n",
        include_str!("page.css")
    );
    html += &summary(report);
    if let Some(run) = median_run(&report.runs) {
        let plot = |width| charts::waterfall(run, width);
        let caption = "<span class=\"key host\"></span>stamped by the host<span class=\"key guest\"></span>by the guest";
        html += &section("Where the time goes", "The boot whose length is the middle one.");
        html += &figure("Waterfall of the phases of the median boot", caption, plot)?;
    }
    let plot = |width| charts::distribution(&report.runs, width);
    html += &section("How the phases spread", "");
    let caption = "Each dot is a boot, the box the middle half, the line the median. The scale is logarithmic; what \
                   took under 0.01 ms is drawn there.";
    html += &figure("Distribution of the time each phase took", caption, plot)?;
    for comparison in &report.comparisons {
        html += &compared(comparison)?;
    }
    html += &section("The phases", "Milliseconds, minimum / median / maximum.");
    html += &table(&HEADER.map(str::to_owned), &report.rows());
    for note in report.notes() {
        html += &format!("<p class=\"soft\">{}</p>\n", escaped(&note));
    }
    html += &every_boot(report);
    html += &section("The machine", "");
    html += "<dl class=\"about\">\n";
    for (what, which) in report.environment.lines() {
        html += &format!("<dt>{}</dt><dd>{}</dd>\n", escaped(what), escaped(&which));
    }
    html += "</dl>\n</body>\n</html>\n";
    Ok(html)
}

fn summary(report: &Report) -> String {
    // To the minute.
    let when = rfc3339(report.environment.unix_ms)[..16].replace('T', " ");
    let runs = &report.runs;
    let median = |values: Vec<f64>| Spread::of(values).map_or("-".into(), |spread| time_text(spread.median));
    let to = |milestone| runs.iter().filter_map(|run| run.at(milestone)).collect();
    let figures = [
        (
            "to the first guest instruction",
            median(to(Milestone::GuestEntered)),
        ),
        ("to the agent", median(to(Milestone::AgentStarted))),
        ("to the engine's first answer", median(START.all_ms(runs))),
        (
            "to the first container's first byte",
            median(to(Milestone::FirstContainer)),
        ),
    ];
    let mut html = format!(
        "<h1>Lighter: cold boot</h1>\n<p class=\"soft\">Boots: {}, {when} UTC. Medians, from the start of the process:</p>\n\
         <dl class=\"figures\">\n",
        runs.len()
    );
    for (what, figure) in figures {
        html += &format!("<div><dt>{what}</dt><dd>{figure}</dd></div>\n");
    }
    html + "</dl>\n"
}

fn compared(comparison: &Comparison) -> Drawn<String> {
    let Comparison { these, those, .. } = comparison;
    let about = format!(
        "Below 1 {these} is faster. Ratios {}: median, and the middle half.",
        comparison.ratios
    );
    let mut html = section(&comparison.title(), &about);
    let plot = |width| charts::ratios(comparison, width);
    let caption = "The dot is the median, the bar the middle half. The scale is logarithmic.";
    html += &figure(&format!("Ratios of {these} to {those}"), caption, plot)?;
    let header = ["", these, those, "ratio"].map(str::to_owned);
    let row = |row: &super::comparison::Row| {
        vec![
            row.what.to_owned(),
            spread_text(row.these),
            spread_text(row.those),
            ratio_text(row.ratio),
        ]
    };
    let rows: Vec<_> = comparison.rows.iter().map(row).collect();
    html += &table(&header, &rows);
    html += &format!(
        "<p>{}:</p>\n<pre>{}</pre>\n",
        escaped(those),
        escaped(&comparison.about.join("\n"))
    );
    Ok(html)
}

fn every_boot(report: &Report) -> String {
    let mut header = vec!["over at, ms".to_owned()];
    header.extend((1..=report.runs.len()).map(|number| number.to_string()));
    let row = |phase: &super::phases::Phase| {
        let mut row = vec![phase.title.to_owned()];
        let times = report.runs.iter().map(|run| run.at(phase.to));
        row.extend(times.map(|ms| ms.map_or("-".into(), |ms| format!("{ms:.1}"))));
        row
    };
    let rows: Vec<_> = PHASES.iter().map(row).collect();
    section("Every boot", "") + &table(&header, &rows)
}

fn section(title: &str, text: &str) -> String {
    let text = match text {
        "" => String::new(),
        text => format!("<p class=\"soft\">{}</p>\n", escaped(text)),
    };
    format!("<h2>{}</h2>\n{text}", escaped(title))
}

/// A plot for each width; the style shows the one that fits. `caption` is HTML.
fn figure(name: &str, caption: &str, plot: impl Fn(u32) -> Drawn<String>) -> Drawn<String> {
    let mut html = "<figure>\n".to_owned();
    for (class, width) in WIDTHS {
        let name = escaped(name);
        html += &format!(
            "<div class=\"{class}\" role=\"img\" aria-label=\"{name}\">{}</div>\n",
            plot(width)?
        );
    }
    html += &format!("<figcaption>{caption}</figcaption>\n</figure>\n");
    Ok(html)
}

fn table(header: &[String], rows: &[impl AsRef<[String]>]) -> String {
    let line = |tag: &str, cells: &[String]| {
        let cells = cells
            .iter()
            .map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell)));
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    };
    let rows: String = rows.iter().map(|row| line("td", row.as_ref())).collect();
    format!(
        "<div class=\"scroll\" tabindex=\"0\">\n<table>\n<thead>{}</thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n",
        line("th", header).trim_end()
    )
}

/// Fit for HTML text and quoted attributes.
fn escaped(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => html += "&amp;",
            '<' => html += "&lt;",
            '>' => html += "&gt;",
            '"' => html += "&quot;",
            other => html.push(other),
        }
    }
    html
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::full;
    use super::*;

    /// When this is set, the page is left there, for a browser to look at.
    const KEPT: &str = "LIGHTER_TEST_PAGE";

    #[test]
    fn the_page_has_everything_and_asks_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let path = std::env::var_os(KEPT).map_or(folder.path().join("report.html"), PathBuf::from);
        PageFile::create(&path).unwrap().write(&full()).unwrap();
        let page = std::fs::read_to_string(&path).unwrap();
        // Two widths of waterfall, distribution and ratios.
        assert_eq!(page.matches("<svg").count(), 6);
        for phase in PHASES {
            assert!(
                page.contains(&format!("<td>{}</td>", phase.title)),
                "{}",
                phase.title
            );
        }
        assert!(page.contains("Example &lt;processor&gt; &amp; more"));
        for link in ["src=", "href=", "url(", "@import", "<script"] {
            assert!(!page.contains(link), "{link}");
        }
    }

    #[test]
    fn the_style_knows_every_colour_of_the_plots() {
        let style = include_str!("page.css");
        for color in [charts::INK, charts::LINE, charts::HOST, charts::GUEST] {
            let attribute = format!("=\"#{:02X}{:02X}{:02X}\"]", color.0, color.1, color.2);
            assert!(style.contains(&attribute), "{attribute}");
        }
    }

    #[test]
    fn a_path_that_cannot_be_written_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("missing/report.html"), folder.path().into()] {
            let error = PageFile::create(&path).unwrap_err();
            assert!(error.message.contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_run_that_fails_leaves_an_earlier_page_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        std::fs::write(&path, "earlier").unwrap();
        drop(PageFile::create(&path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "earlier");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
