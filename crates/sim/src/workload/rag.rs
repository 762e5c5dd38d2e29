//! Retrieval: long prompts put together from documents that many share, in any order.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::prompt::Prompt;
use crate::workload::gaps::Gaps;
use crate::workload::{Arrival, Workload, WorkloadRequest, spread};

/// Questions about documents: a system prompt that all share, a few documents, the question. A
/// document is asked for the more often the lower its number (Zipf), and stands at any place among
/// the others, so that prefixes match as far as the first documents happen to be the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Rag {
    /// How many questions.
    pub requests: u32,
    /// Times between two.
    pub gaps: Gaps,
    /// Length of the system prompt.
    pub system_tokens: u32,
    /// Documents there are.
    pub documents: u32,
    /// Mean length of a document; lengths are uniform between half and one and a half of it.
    pub document_tokens: u32,
    /// Different documents in a prompt.
    pub per_prompt: u32,
    /// The document of rank `r` is asked for in proportion to `r` to the power of minus this; 0
    /// for all alike.
    pub skew: f64,
    /// Mean length of a question, spread likewise.
    pub question_tokens: u32,
    /// Mean length of an answer, spread likewise.
    pub answer_tokens: u32,
}

impl Default for Rag {
    /// ISL 6600 at 8 a second: about as much as eight 8B models on L40S can answer within the
    /// default SLO.
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
            answer_tokens: 120,
        }
    }
}

impl Workload {
    /// Questions about shared documents.
    #[must_use]
    pub fn rag(rag: &Rag, seed: u64) -> Self {
        const SYSTEM_STREAM: u64 = 0;
        let mut rng = SmallRng::seed_from_u64(seed);
        // (its stream, its length), the one asked for most often first.
        let documents: Vec<(u64, u32)> = (1..=u64::from(rag.documents.max(1)))
            .map(|stream| (stream, spread(rag.document_tokens, 0.5, &mut rng)))
            .collect();
        let popularity = Popularity::new(documents.len(), rag.skew);
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
                answer_stream: None,
                output_tokens: spread(rag.answer_tokens, 0.5, &mut rng),
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

/// How often each of some things is asked for.
struct Popularity {
    /// Its weight, by rank.
    weights: Vec<f64>,
}

impl Popularity {
    fn new(things: usize, skew: f64) -> Self {
        Self {
            weights: (1..=things).map(|rank| (rank as f64).powf(-skew)).collect(),
        }
    }

    /// Draws one that is not `taken`.
    fn sample(&self, taken: &[usize], rng: &mut impl Rng) -> usize {
        let left = || {
            let all = self.weights.iter().enumerate();
            all.filter(|(index, _)| !taken.contains(index))
        };
        let total: f64 = left().map(|(_, weight)| weight).sum();
        let mut point = rng.random::<f64>() * total;
        let mut last = 0;
        for (index, weight) in left() {
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
    fn popular_documents_are_asked_for_more_often_and_never_twice() {
        let popularity = Popularity::new(10, 1.0);
        let mut rng = SmallRng::seed_from_u64(1);
        let mut counts = [0_u32; 10];
        for _ in 0..20_000 {
            counts[popularity.sample(&[], &mut rng)] += 1;
        }
        // 1 / (1 + 1/2 + … + 1/10) = 0.341 of 20,000, and a tenth of that for the last.
        assert!((6600..7100).contains(&counts[0]), "{counts:?}");
        assert!((600..780).contains(&counts[9]), "{counts:?}");
        let taken: Vec<usize> = (0..9).collect();
        assert_eq!(popularity.sample(&taken, &mut rng), 9);
    }
}
