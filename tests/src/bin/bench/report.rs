//! Samples to rows: medians, spread and ratios.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use mesh_tests::json_file;
use serde::Serialize;

use crate::measure::Sample;
use crate::work::{Variant, WORKS};

/// One metric of one variant of one work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) work: &'static str,
    pub(crate) variant: Variant,
    pub(crate) metric: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) ratio_to_plain: Option<f64>,
    pub(crate) ratio_to_tls: Option<f64>,
}

/// The rows of all samples, in the order of the works.
pub(crate) fn rows(samples: &[Sample]) -> Vec<Row> {
    let mut grouped: BTreeMap<_, Vec<f64>> = BTreeMap::new();
    for sample in samples {
        let place = WORKS.iter().position(|work| work.name == sample.work);
        let key = (
            place,
            sample.work,
            sample.metric,
            sample.variant,
            sample.unit,
        );
        grouped.entry(key).or_default().push(sample.value);
    }
    let medians: BTreeMap<_, f64> = grouped
        .iter()
        .map(|((_, work, metric, variant, _), values)| ((*work, *metric, *variant), median(values)))
        .collect();
    let ratio =
        |value: f64, work, metric, to| medians.get(&(work, metric, to)).map(|base| value / base);
    grouped
        .iter()
        .map(|((_, work, metric, variant, unit), values)| {
            let median = median(values);
            Row {
                work,
                variant: *variant,
                metric,
                unit,
                median,
                min: values.iter().copied().fold(f64::INFINITY, f64::min),
                max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                ratio_to_plain: ratio(median, *work, *metric, Variant::Plain),
                ratio_to_tls: ratio(median, *work, *metric, Variant::Tls),
            }
        })
        .collect()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

/// The rows as a table a person reads.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<38} {:<12} {:<20} {:>10} {:>10} {:>10} {:<7} {:>8} {:>8}\n",
        "work", "variant", "metric", "median", "min", "max", "unit", "of plain", "of tls"
    );
    for row in rows {
        let ratio =
            |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
        let variant = format!("{:?}", row.variant).to_lowercase();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:<38} {:<12} {:<20} {:>10.2} {:>10.2} {:>10.2} {:<7} {:>8} {:>8}",
            row.work,
            variant,
            row.metric,
            row.median,
            row.min,
            row.max,
            row.unit,
            ratio(row.ratio_to_plain),
            ratio(row.ratio_to_tls)
        );
    }
    text
}

/// What the mesh carries at less than this share of plain TCP's rate is a defect, not a result.
const LEAST: f64 = 0.12;

/// The rows that are below [`LEAST`]; rates and throughputs only, where more is better.
pub(crate) fn too_slow(rows: &[Row]) -> Vec<String> {
    rows.iter()
        .filter(|row| row.variant == Variant::Mesh)
        .filter(|row| ["throughput", "rate"].contains(&row.metric))
        .filter_map(|row| Some((row, row.ratio_to_plain.filter(|ratio| *ratio < LEAST)?)))
        .map(|(row, ratio)| format!("{}: {} is {ratio:.2} of plain TCP's", row.work, row.metric))
        .collect()
}

/// Writes the rows as a JSON array.
pub(crate) fn write(rows: &[Row], path: &Path) -> Result<()> {
    json_file::write(path, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(variant: Variant, value: f64) -> Sample {
        Sample {
            work: "bulk, 1 stream",
            variant,
            metric: "throughput",
            unit: "Gbit/s",
            value,
        }
    }

    #[test]
    fn a_ratio_is_that_of_the_medians() {
        let samples: Vec<_> = [
            (Variant::Plain, [8.0, 1.0, 10.0]),
            (Variant::Mesh, [2.0, 9.0, 1.0]),
        ]
        .into_iter()
        .flat_map(|(variant, values)| values.map(|value| sample(variant, value)))
        .collect();
        let rows = rows(&samples);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[1].median, 2.0);
        assert_eq!((rows[1].min, rows[1].max), (1.0, 9.0));
        assert_eq!(rows[1].ratio_to_plain, Some(0.25));
        assert_eq!(rows[1].ratio_to_tls, None);
    }

    #[test]
    fn what_is_far_below_plain_is_named() {
        let of = |share| {
            let samples = [sample(Variant::Plain, 10.0), sample(Variant::Mesh, share)];
            too_slow(&rows(&samples))
        };
        assert_eq!(of(1.3), [""; 0]);
        assert_eq!(
            of(1.0),
            ["bulk, 1 stream: throughput is 0.10 of plain TCP's"]
        );
    }

    #[test]
    fn an_even_number_of_samples_has_its_median_between_two() {
        assert_eq!(median(&[1.0, 4.0, 2.0, 9.0]), 3.0);
    }
}
