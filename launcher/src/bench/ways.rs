//! The same measured in several ways, round by round: Lighter's, and each of the others beside it.

use super::comparison::ratio_text;
use super::environment::Environment;
use super::report::spread_text;
use super::stats::{Ratio, Spread};
use crate::cli::{print, print_json};
use crate::error::{Error, Result};
use crate::table;
use serde::Serialize;

/// One figure of one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// Of what, with its unit.
    pub what: &'static str,
    /// The value.
    pub value: f64,
    /// Whether more of it is faster: so much in a second, and not so long.
    pub rate: bool,
}

impl Figure {
    /// So much in a second.
    pub fn rate(what: &'static str, value: f64) -> Self {
        Self {
            what,
            value,
            rate: true,
        }
    }

    /// How long it takes.
    pub fn time(what: &'static str, value: f64) -> Self {
        Self {
            what,
            value,
            rate: false,
        }
    }
}

/// One way, and what was measured of it: the figures of each round, always the same ones.
#[derive(Clone, Debug)]
pub struct Way {
    name: &'static str,
    rounds: Vec<Vec<Figure>>,
}

impl Way {
    /// Nothing yet.
    pub fn new(name: &'static str) -> Self {
        Self { name, rounds: vec![] }
    }

    /// Adds a round, if it is one that counts.
    pub fn add_if(&mut self, counts: bool, figures: Vec<Figure>) {
        if counts {
            self.rounds.push(figures);
        }
    }

    fn values(&self, index: usize) -> Vec<f64> {
        self.rounds.iter().map(|figures| figures[index].value).collect()
    }
}

/// What was measured of one thing.
#[derive(Debug, Serialize)]
pub struct Table {
    title: &'static str,
    rows: Vec<Row>,
}

/// One figure in every way.
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    lighter: Spread,
    others: Vec<Beside>,
}

/// Another way beside Lighter's.
#[derive(Debug, Serialize)]
struct Beside {
    way: &'static str,
    spread: Spread,
    /// How many times as fast Lighter is, round by round.
    lighter_faster: Option<Ratio>,
}

impl Table {
    /// Of Lighter's way and `others`, with as many rounds each.
    ///
    /// # Errors
    /// When nothing was measured.
    pub fn new(title: &'static str, lighter: &Way, others: &[&Way]) -> Result<Self> {
        let nothing = || Error::failure(format!("nothing was measured: {title}"));
        let row = |(index, figure): (usize, &Figure)| {
            let ours = lighter.values(index);
            let beside = |way: &&Way| {
                let theirs = way.values(index);
                Ok(Beside {
                    way: way.name,
                    lighter_faster: match figure.rate {
                        true => Ratio::of(&ours, &theirs),
                        false => Ratio::of(&theirs, &ours),
                    },
                    spread: Spread::of(theirs).ok_or_else(nothing)?,
                })
            };
            Ok(Row {
                what: figure.what,
                others: others.iter().map(beside).collect::<Result<_>>()?,
                lighter: Spread::of(ours).ok_or_else(nothing)?,
            })
        };
        let figures = lighter.rounds.first().ok_or_else(nothing)?;
        Ok(Self {
            title,
            rows: figures.iter().enumerate().map(row).collect::<Result<_>>()?,
        })
    }

    fn text(&self) -> String {
        let mut table = table::plain();
        let ways = || self.rows.iter().take(1).flat_map(|row| &row.others);
        let header = [self.title.to_owned(), "lighter".to_owned()].into_iter();
        let others = ways().flat_map(|beside| [beside.way.to_owned(), "lighter's speed by that".to_owned()]);
        table.set_header(header.chain(others));
        for row in &self.rows {
            let cells = [row.what.to_owned(), spread_text(Some(row.lighter))].into_iter();
            let others = row.others.iter().flat_map(|beside| {
                [
                    spread_text(Some(beside.spread)),
                    ratio_text(beside.lighter_faster),
                ]
            });
            table.add_row(cells.chain(others));
        }
        table::align_numbers(&mut table);
        table.to_string()
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Host and guest.
    pub environment: Environment,
    /// How many rounds.
    pub rounds: u32,
    /// What has to be known of the figures, and what the others were started with; a line each.
    pub about: Vec<String>,
    /// The figures.
    pub tables: Vec<Table>,
}

impl Report {
    /// Prints it, as JSON or for people.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn tell(&self, json: bool) -> Result<()> {
        match json {
            true => print_json(self),
            false => print(&self.text()),
        }
    }

    fn text(&self) -> String {
        let mut about = table::plain();
        // Nothing is booted again.
        for (what, which) in self
            .environment
            .lines()
            .into_iter()
            .filter(|(what, _)| *what != "file cache")
        {
            about.add_row([what, &which]);
        }
        let mut text = format!(
            "{about}\n\nRounds: {}, after one that is not counted. Figures: min / median / max. Lighter's speed by another's: how many \
             times as fast Lighter is, round by round (middle half).\n",
            self.rounds
        );
        for table in &self.tables {
            text += &format!("\n{}\n", table.text());
        }
        if !self.about.is_empty() {
            text += &format!("\n{}\n", self.about.join("\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::environment::tests::somewhere;
    use super::*;

    fn way(name: &'static str, factor: f64) -> Way {
        let mut way = Way::new(name);
        for value in [1.0, 2.0, 4.0] {
            way.add_if(
                true,
                vec![
                    Figure::time("one, µs", value * factor),
                    Figure::rate("many per second", 100.0 / factor),
                ],
            );
        }
        way.add_if(false, vec![]);
        way
    }

    #[test]
    fn faster_is_faster_whatever_the_unit() {
        let (lighter, host, peer) = (way("lighter", 2.0), way("host", 1.0), way("qemu", 6.0));
        let table = Table::new("a folder", &lighter, &[&host, &peer]).unwrap();
        for row in &table.rows {
            let ratios: Vec<f64> = row
                .others
                .iter()
                .map(|beside| beside.lighter_faster.unwrap().median)
                .collect();
            assert!(
                (ratios[0] - 0.5).abs() < 1e-9 && (ratios[1] - 3.0).abs() < 1e-9,
                "{ratios:?}"
            );
        }
        let report = Report {
            environment: somewhere(),
            rounds: 3,
            about: vec!["qemu 10".into()],
            tables: vec![table],
        };
        let text = report.text();
        for part in [
            "a folder",
            "one, µs",
            "2.00 / 4.00 / 8.00",
            "0.50 (0.50 to 0.50)",
            "3.00",
            "qemu 10",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("file cache"), "{text}");
    }

    #[test]
    fn nothing_is_no_table() {
        let error = Table::new("a folder", &Way::new("lighter"), &[]).unwrap_err();
        assert!(error.message.contains("a folder"), "{error}");
    }
}
