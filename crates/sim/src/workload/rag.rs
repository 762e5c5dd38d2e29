//! Retrieval-augmented generation: long prompts composed of shared documents in random order.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::prompt::Prompt;
use crate::workload::gaps::Gaps;
use crate::workload::{Arrival, Workload, WorkloadRequest, spread};

/// Questions about documents. A prompt consists of a shared system prompt, a few documents, and the
/// question. The popularity of documents follows Zipf's law. The order of the documents in a prompt
/// is random, so two prompts share a prefix only as far as their first documents are equal.
#[derive(Clone, Debug, PartialEq)]
pub struct Rag {
    /// Number of questions.
    pub requests: u32,
    /// Times between questions.
    pub gaps: Gaps,
    /// Length of the system prompt.
    pub system_tokens: u32,
    /// Number of documents.
    pub documents: u32,
    /// Mean length of a document; uniform in 0.5 to 1.5 times the mean.
    pub document_tokens: u32,
    /// Number of different documents in a prompt.
    pub per_prompt: u32,
    /// Exponent of Zipf's law: the weight of the document of rank `r` is `r` to the power of
    /// `-skew`. 0 gives equal weights.
    pub skew: f64,
    /// Mean length of a question; uniform in 0.5 to 1.5 times the mean.
    pub question_tokens: u32,
    /// Mean length of an output; uniform in 0.5 to 1.5 times the mean.
    pub output_tokens: u32,
}

impl Default for Rag {
    /// Returns 2000 questions with a mean ISL of 6600, in a Poisson process of 8 per second. The
    /// rate is meant for eight workers, each with an 8B model on one L40S.
    fn default() -> Self {
        Self {
            requests: 2000,
            gaps: Gaps::poisson(Duration::from_millis(125)),
            system_tokens: 500,
            documents: 200,
            document_tokens: 1500,
            per_prompt: 4,
            skew: 1.0,
            question_tokens: 100,
            output_tokens: 120,
        }
    }
}

impl Workload {
    /// Returns the questions of a retrieval workload, in order of arrival. The number of documents
    /// is at least 1, and no prompt contains a document twice. Equal seeds give equal requests.
    #[must_use]
    pub fn rag(rag: &Rag, seed: u64) -> Self {
        const SYSTEM_STREAM: u64 = 0;
        let mut rng = SmallRng::seed_from_u64(seed);
        // Stream and length of each document, by popularity.
        let documents: Vec<(u64, u32)> = (1..=u64::from(rag.documents.max(1)))
            .map(|stream| (stream, spread(rag.document_tokens, 0.5, &mut rng)))
            .collect();
        let popularity = Popularity::zipf(documents.len(), rag.skew);
        let per_prompt = (rag.per_prompt as usize).min(documents.len());
        let mut start = Duration::ZERO;
        let mut next_stream = documents.len() as u64 + 1;
        let requests = (0..rag.requests).map(|_| {
            start += rag.gaps.sample(&mut rng);
            let mut chosen: Vec<usize> = Vec::with_capacity(per_prompt);
            while chosen.len() < per_prompt {
                let document = popularity.sample(&chosen, &mut rng);
                chosen.push(document);
            }
            chosen.shuffle(&mut rng);
            let mut prompt = Prompt::new().then(SYSTEM_STREAM, rag.system_tokens);
            for document in chosen {
                let (stream, tokens) = documents[document];
                prompt = prompt.then(stream, tokens);
            }
            let question = spread(rag.question_tokens, 0.5, &mut rng);
            next_stream += 1;
            WorkloadRequest {
                prompt: prompt.then(next_stream - 1, question),
                output_stream: None,
                output_tokens: spread(rag.output_tokens, 0.5, &mut rng),
                arrival: Arrival::At(start),
            }
        });
        Self {
            name: "rag".to_owned(),
            requests: requests.collect(),
            concurrency: 0,
        }
    }
}

/// The popularity of documents.
struct Popularity {
    /// Relative weight of each document, by rank.
    weights: Vec<f64>,
}

impl Popularity {
    /// Returns the weights of Zipf's law.
    fn zipf(documents: usize, skew: f64) -> Self {
        Self {
            weights: (1..=documents)
                .map(|rank| (rank as f64).powf(-skew))
                .collect(),
        }
    }

    /// Draws the rank, from 0, of a document that is not in `excluded`. At least one document must
    /// remain.
    fn sample(&self, excluded: &[usize], rng: &mut impl Rng) -> usize {
        let remaining = || {
            let all = self.weights.iter().enumerate();
            all.filter(|(index, _)| !excluded.contains(index))
        };
        let total: f64 = remaining().map(|(_, weight)| weight).sum();
        let mut point = rng.random::<f64>() * total;
        let mut last = 0;
        for (index, weight) in remaining() {
            last = index;
            point -= weight;
            if point < 0.0 {
                break;
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn popular_documents_are_drawn_more_often_and_excluded_ones_never() {
        let popularity = Popularity::zipf(10, 1.0);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = [0_u32; 10];
        for _ in 0..20_000 {
            counts[popularity.sample(&[], &mut rng)] += 1;
        }
        // 1 / (1 + 1/2 + … + 1/10) = 0.341 of 20,000, and a tenth of it for the last document.
        assert!((6600..7100).contains(&counts[0]), "{counts:?}");
        assert!((600..780).contains(&counts[9]), "{counts:?}");
        let excluded: Vec<usize> = (0..9).collect();
        assert_eq!(popularity.sample(&excluded, &mut rng), 9);
    }
}
