//! The mix of prompts that a verification sends. Each kind overlaps the caches in another way:
//! shared prefixes, exact repeats, prompts that end with a block, prompts without overlap, plain
//! text, and conversations that grow by the engine's own output.

use std::collections::VecDeque;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::{Value, json};

/// The range of token ids. Any vocabulary has ordinary tokens there, above bytes and framing.
const FIRST_ID: u32 = 1000;
const LAST_ID: u32 = 4000;

const PREFIXES: usize = 6;
/// Number of recent prompts from which repeats are drawn.
const MAX_RECENT: usize = 24;
const CONVERSATIONS: usize = 6;
const SYSTEM_PROMPTS: usize = 2;
const MAX_TURNS: usize = 8;

/// The words of texts.
const WORDS: [&str; 40] = [
    "the", "router", "sends", "a", "request", "to", "one", "engine", "and", "counts", "blocks",
    "while", "its", "answer", "streams", "back", "import", "def", "return", "class", "value", "42",
    "1987", "if", "not", "list", "of", "names", "time", "cache", "prefix", "token", "hold", "free",
    "write", "read", "(x)", "été", "日本", "→",
];

/// How a prompt was made, and so how it overlaps the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Token ids with a prefix of other prompts.
    SharedPrefix,
    /// An earlier prompt of token ids.
    Repeat,
    /// Token ids that end with a block. Engines store the last block twice for repeats.
    Aligned,
    /// Token ids without a prefix of other prompts.
    Alone,
    /// A text, for `/v1/completions`.
    Text,
    /// A turn of a conversation, for `/v1/chat/completions`.
    Chat,
}

impl Kind {
    /// All kinds, in the order of reports.
    pub const ALL: [Self; 6] = [
        Self::SharedPrefix,
        Self::Repeat,
        Self::Aligned,
        Self::Alone,
        Self::Text,
        Self::Chat,
    ];

    /// Returns the name that reports show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SharedPrefix => "shared prefix",
            Self::Repeat => "exact repeat",
            Self::Aligned => "ends with a block",
            Self::Alone => "nothing shared",
            Self::Text => "text",
            Self::Chat => "chat",
        }
    }

    /// Returns whether exact predictions need the engine's tokenizer.
    #[must_use]
    pub fn needs_tokenizer(self) -> bool {
        matches!(self, Self::Text | Self::Chat)
    }
}

/// Limits for the lengths of prompts and outputs.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// Maximum number of prompt tokens.
    pub prompt: u32,
    /// Maximum number of output tokens.
    pub output: u32,
}

/// A request to send.
#[derive(Debug)]
pub(super) struct PlannedRequest {
    pub(super) kind: Kind,
    pub(super) path: &'static str,
    pub(super) body: Bytes,
    pub(super) is_streaming: bool,
    /// The client closes the stream after this number of tokens.
    pub(super) closes_after: Option<u32>,
    /// Index of the conversation to which the output belongs.
    conversation: Option<usize>,
}

#[derive(Debug, Default)]
struct Conversation {
    messages: Vec<Value>,
    /// Whether the latest turn waits for its response.
    is_open: bool,
    prompt_tokens: u32,
}

/// A generator of requests.
#[derive(Debug)]
pub(super) struct PromptMix {
    rng: SmallRng,
    model: String,
    block_size: u32,
    lengths: Lengths,
    stream_fraction: f64,
    abort_fraction: f64,
    prefixes: Vec<Vec<u32>>,
    recent: VecDeque<Vec<u32>>,
    systems: Vec<String>,
    conversations: Vec<Conversation>,
}

impl PromptMix {
    /// Draws the shared prefixes and system prompts from `seed`. `stream_fraction` is the fraction
    /// of requests that are streamed, and `abort_fraction` the fraction of streams that the client
    /// closes early; both must be from 0 to 1. `block_size` is only used for prompts that end with
    /// a block.
    pub(super) fn new(
        seed: u64,
        model: String,
        block_size: u32,
        lengths: Lengths,
        stream_fraction: f64,
        abort_fraction: f64,
    ) -> Self {
        let mut mix = Self {
            rng: SmallRng::seed_from_u64(seed),
            model,
            block_size,
            lengths,
            stream_fraction,
            abort_fraction,
            prefixes: Vec::new(),
            recent: VecDeque::new(),
            systems: Vec::new(),
            conversations: (0..CONVERSATIONS)
                .map(|_| Conversation::default())
                .collect(),
        };
        let longest = lengths.prompt;
        for number in 0..PREFIXES {
            let length = longest * (number as u32 + 1) / (PREFIXES as u32 + 2);
            let prefix = mix.ids(length);
            mix.prefixes.push(prefix);
        }
        for _ in 0..SYSTEM_PROMPTS {
            let system = mix.text(longest / 8);
            mix.systems.push(system);
        }
        mix
    }

    /// Returns the next request, of a kind drawn with fixed weights. A repeat without an earlier
    /// prompt, and a chat while all conversations have an open turn, become `Alone`.
    ///
    /// A chat keeps its turn open until [`record_output`](Self::record_output) is called.
    pub(super) fn next(&mut self) -> PlannedRequest {
        let kind = match self.rng.random_range(0..100) {
            0..35 => Kind::SharedPrefix,
            35..47 => Kind::Repeat,
            47..57 => Kind::Aligned,
            57..65 => Kind::Alone,
            65..73 => Kind::Text,
            _ => Kind::Chat,
        };
        match kind {
            Kind::Chat => self.chat(),
            Kind::Text => {
                let tokens = self
                    .rng
                    .random_range(10..=(self.lengths.prompt / 4).max(10));
                let text = self.text(tokens);
                self.completion(kind, json!(text))
            }
            Kind::Repeat => match self.recent.len() {
                0 => self.fresh(Kind::Alone),
                recent => {
                    let ids = self.recent[self.rng.random_range(0..recent)].clone();
                    self.completion(kind, json!(ids))
                }
            },
            kind => self.fresh(kind),
        }
    }

    /// Records the output of a request of [`next`](Self::next) and its number of prompt tokens;
    /// `None` without a complete response, which ends the conversation. Requests that are no chats
    /// are ignored.
    pub(super) fn record_output(&mut self, ask: &PlannedRequest, output: Option<(String, u32)>) {
        let Some(conversation) = ask.conversation.map(|index| &mut self.conversations[index])
        else {
            return;
        };
        conversation.is_open = false;
        match output {
            Some((content, prompt_tokens)) => {
                let message = json!({"role": "assistant", "content": content});
                conversation.messages.push(message);
                conversation.prompt_tokens = prompt_tokens;
            }
            None => conversation.messages.clear(),
        }
    }

    /// Returns a request with a new prompt of token ids: `Alone`, `Aligned` or `SharedPrefix`.
    /// Later repeats may draw the prompt.
    fn fresh(&mut self, kind: Kind) -> PlannedRequest {
        let mut ids = match kind {
            Kind::Alone => Vec::new(),
            _ => self.prefixes[self.rng.random_range(0..PREFIXES)].clone(),
        };
        // Some prompts have only the beginning of a prefix.
        if self.rng.random_bool(0.3) {
            ids.truncate(self.rng.random_range(0..=ids.len()));
        }
        let free_tokens = self.lengths.prompt.saturating_sub(ids.len() as u32);
        let own = self.rng.random_range(1..=free_tokens.max(1));
        // Short suffixes are more frequent than long ones.
        let own = self.rng.random_range(1..=own);
        ids.extend(self.ids(own));
        if kind == Kind::Aligned {
            let block = self.block_size as usize;
            let whole = (ids.len() / block).max(1) * block;
            let missing = whole.saturating_sub(ids.len()) as u32;
            ids.extend(self.ids(missing));
            ids.truncate(whole);
        }
        if self.recent.len() == MAX_RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(ids.clone());
        self.completion(kind, json!(ids))
    }

    /// Returns the next turn of a conversation without an open turn, and opens it; a prompt of kind
    /// `Alone` if all have one. A conversation with too many turns or tokens starts again.
    fn chat(&mut self) -> PlannedRequest {
        let free = (0..CONVERSATIONS).filter(|&it| !self.conversations[it].is_open);
        let free: Vec<usize> = free.collect();
        let Some(&index) = free.choose(&mut self.rng) else {
            return self.fresh(Kind::Alone);
        };
        let question = self.rng.random_range(3..=(self.lengths.prompt / 16).max(3));
        let question = self.text(question);
        let system = self.systems[self.rng.random_range(0..SYSTEM_PROMPTS)].clone();
        let conversation = &mut self.conversations[index];
        // A tokenizer may need many tokens for these words, so half of the limit stays free.
        let is_long = conversation.prompt_tokens > self.lengths.prompt / 2;
        if conversation.messages.len() > 2 * MAX_TURNS || is_long {
            *conversation = Conversation::default();
        }
        if conversation.messages.is_empty() {
            let message = json!({"role": "system", "content": system});
            conversation.messages.push(message);
        }
        let message = json!({"role": "user", "content": question});
        conversation.messages.push(message);
        conversation.is_open = true;
        let messages = json!(conversation.messages);
        let mut ask = self.ask(Kind::Chat, "/v1/chat/completions", "messages", messages);
        ask.conversation = Some(index);
        ask
    }

    fn completion(&mut self, kind: Kind, prompt: Value) -> PlannedRequest {
        self.ask(kind, "/v1/completions", "prompt", prompt)
    }

    /// Returns a request with `prompt` in the given field of its body. Draws the output length,
    /// whether the response is streamed, and whether and when the client closes the stream. Outputs
    /// of one or two tokens are never closed early.
    fn ask(
        &mut self,
        kind: Kind,
        path: &'static str,
        field: &str,
        prompt: Value,
    ) -> PlannedRequest {
        let is_streaming = self.rng.random_bool(self.stream_fraction);
        // Outputs are mostly short, so that many prompts take little time.
        let max_tokens = self.rng.random_range(1..=self.lengths.output.max(1));
        let tokens = self.rng.random_range(1..=max_tokens);
        let closes_early = is_streaming && tokens > 2 && self.rng.random_bool(self.abort_fraction);
        let closes_after = closes_early.then(|| self.rng.random_range(1..tokens));
        let mut body = json!({
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": is_streaming,
        });
        body[field] = prompt;
        if is_streaming {
            body["stream_options"] = json!({"include_usage": true});
        }
        PlannedRequest {
            kind,
            path,
            body: Bytes::from(body.to_string()),
            is_streaming,
            closes_after,
            conversation: None,
        }
    }

    fn ids(&mut self, count: u32) -> Vec<u32> {
        let ids = (0..count).map(|_| self.rng.random_range(FIRST_ID..LAST_ID));
        ids.collect()
    }

    /// Returns a text of about this number of tokens.
    fn text(&mut self, tokens: u32) -> String {
        let mut text = String::new();
        for number in 0..(tokens / 2).max(1) {
            if number > 0 {
                text.push(' ');
            }
            text.push_str(WORDS[self.rng.random_range(0..WORDS.len())]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt_mix(abort_fraction: f64) -> PromptMix {
        let lengths = Lengths {
            prompt: 600,
            output: 40,
        };
        PromptMix::new(7, "m".to_owned(), 16, lengths, 0.6, abort_fraction)
    }

    fn prompt(ask: &PlannedRequest) -> Value {
        let body: Value = serde_json::from_slice(&ask.body).unwrap();
        body["prompt"].clone()
    }

    #[test]
    fn every_kind_occurs_and_keeps_its_promise() {
        let mut mix = prompt_mix(0.2);
        let mut seen = Vec::new();
        let mut aborted = 0;
        for _ in 0..400 {
            let ask = mix.next();
            let prompt = prompt(&ask);
            let length = prompt.as_array().map(Vec::len);
            assert!(length.is_none_or(|length| (1..=600).contains(&length)));
            match ask.kind {
                Kind::Aligned => assert_eq!(length.unwrap() % 16, 0),
                Kind::Repeat => assert!(seen.contains(&prompt)),
                _ => {}
            }
            aborted += usize::from(ask.closes_after.is_some());
            assert!(ask.is_streaming || ask.closes_after.is_none());
            mix.record_output(&ask, Some(("output".to_owned(), 50)));
            seen.push(prompt);
        }
        assert!((10..120).contains(&aborted), "{aborted}");
    }

    #[test]
    fn conversations_grow_by_their_outputs_and_one_turn_at_a_time() {
        let mut mix = prompt_mix(0.0);
        let mut turns = Vec::new();
        while turns.len() < 200 {
            let ask = mix.next();
            if ask.kind == Kind::Chat {
                let body: Value = serde_json::from_slice(&ask.body).unwrap();
                turns.push(body["messages"].as_array().unwrap().len());
                let open = mix
                    .conversations
                    .iter()
                    .filter(|conversation| conversation.is_open);
                assert_eq!(open.count(), 1);
                mix.record_output(&ask, Some(("output".to_owned(), 10)));
            }
        }
        assert!(
            turns.iter().all(|&length| length % 2 == 0),
            "system, then turns"
        );
        assert!(turns.iter().any(|&length| length >= 8));
    }

    #[test]
    fn a_turn_without_an_output_ends_its_conversation() {
        let mut mix = prompt_mix(0.0);
        for _ in 0..200 {
            let ask = mix.next();
            mix.record_output(&ask, None);
        }
        assert!(
            mix.conversations
                .iter()
                .all(|conversation| conversation.messages.is_empty())
        );
    }
}
