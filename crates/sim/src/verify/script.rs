//! What engines are asked for, so that every way of meeting a cached prefix occurs: prefixes that
//! many prompts share, exact repeats, repeats that end with a block, prompts that nothing shares,
//! plain text, and conversations that grow by the engine's own answers.

use std::collections::VecDeque;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use serde_json::{Value, json};

/// Ids that are ordinary tokens in any vocabulary: above those for bytes and framing.
const FIRST_ID: u32 = 1000;
const LAST_ID: u32 = 4000;

const PREFIXES: usize = 6;
/// Prompts that may be repeated.
const MOST_RECENT: usize = 24;
const CONVERSATIONS: usize = 6;
const SYSTEM_PROMPTS: usize = 2;
const MOST_TURNS: usize = 8;

/// A text of words that any tokenizer knows how to cut.
const WORDS: [&str; 40] = [
    "the", "router", "sends", "a", "request", "to", "one", "engine", "and", "counts", "blocks",
    "while", "its", "answer", "streams", "back", "import", "def", "return", "class", "value", "42",
    "1987", "if", "not", "list", "of", "names", "time", "cache", "prefix", "token", "hold", "free",
    "write", "read", "(x)", "été", "日本", "→",
];

/// How a prompt came about, and so how it meets the caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Token ids that begin as other prompts do.
    SharedPrefix,
    /// A former prompt of token ids once more.
    Repeat,
    /// Token ids that end with a block, which engines store twice when they are repeated.
    Aligned,
    /// Token ids that no other prompt begins with.
    Alone,
    /// A text, for `/v1/completions`.
    Text,
    /// A turn of a conversation, for `/v1/chat/completions`.
    Chat,
}

impl Kind {
    /// All of them, in the order they are shown.
    pub const ALL: [Self; 6] = [
        Self::SharedPrefix,
        Self::Repeat,
        Self::Aligned,
        Self::Alone,
        Self::Text,
        Self::Chat,
    ];

    /// As it is shown.
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

    /// Whether the router must know the engine's tokenizer to predict it in full.
    #[must_use]
    pub fn needs_tokenizer(self) -> bool {
        matches!(self, Self::Text | Self::Chat)
    }
}

/// Limits of what is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// Tokens of the longest prompt.
    pub prompt: u32,
    /// Tokens of the longest answer.
    pub answer: u32,
}

/// One request to make.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) kind: Kind,
    pub(super) path: &'static str,
    pub(super) body: Bytes,
    pub(super) streams: bool,
    /// The client leaves after so many tokens.
    pub(super) leaves_after: Option<u32>,
    /// Which conversation its answer belongs to.
    conversation: Option<usize>,
}

#[derive(Debug, Default)]
struct Conversation {
    messages: Vec<Value>,
    /// Its latest turn has no answer yet.
    is_open: bool,
    prompt_tokens: u32,
}

/// Makes up requests, one after another.
#[derive(Debug)]
pub(super) struct Script {
    rng: SmallRng,
    model: String,
    block_size: u32,
    lengths: Lengths,
    stream_share: f64,
    abort_share: f64,
    prefixes: Vec<Vec<u32>>,
    recent: VecDeque<Vec<u32>>,
    systems: Vec<String>,
    conversations: Vec<Conversation>,
}

impl Script {
    pub(super) fn new(
        seed: u64,
        model: String,
        block_size: u32,
        lengths: Lengths,
        stream_share: f64,
        abort_share: f64,
    ) -> Self {
        let mut script = Self {
            rng: SmallRng::seed_from_u64(seed),
            model,
            block_size,
            lengths,
            stream_share,
            abort_share,
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
            let prefix = script.ids(length);
            script.prefixes.push(prefix);
        }
        for _ in 0..SYSTEM_PROMPTS {
            let system = script.text(longest / 8);
            script.systems.push(system);
        }
        script
    }

    pub(super) fn next(&mut self) -> Ask {
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

    /// The answer to a request that [`next`](Self::next) made up; `None` if there was no whole one.
    pub(super) fn answered(&mut self, ask: &Ask, answer: Option<(String, u32)>) {
        let Some(conversation) = ask.conversation.map(|index| &mut self.conversations[index])
        else {
            return;
        };
        conversation.is_open = false;
        match answer {
            Some((content, prompt_tokens)) => {
                let message = json!({"role": "assistant", "content": content});
                conversation.messages.push(message);
                conversation.prompt_tokens = prompt_tokens;
            }
            None => conversation.messages.clear(),
        }
    }

    fn fresh(&mut self, kind: Kind) -> Ask {
        let mut ids = match kind {
            Kind::Alone => Vec::new(),
            _ => self.prefixes[self.rng.random_range(0..PREFIXES)].clone(),
        };
        // Some prompts leave a prefix before its end.
        if self.rng.random_bool(0.3) {
            ids.truncate(self.rng.random_range(0..=ids.len()));
        }
        let room = self.lengths.prompt.saturating_sub(ids.len() as u32);
        let own = self.rng.random_range(1..=room.max(1));
        // Short ones more often than long ones.
        let own = self.rng.random_range(1..=own);
        ids.extend(self.ids(own));
        if kind == Kind::Aligned {
            let block = self.block_size as usize;
            let whole = (ids.len() / block).max(1) * block;
            let missing = whole.saturating_sub(ids.len()) as u32;
            ids.extend(self.ids(missing));
            ids.truncate(whole);
        }
        if self.recent.len() == MOST_RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(ids.clone());
        self.completion(kind, json!(ids))
    }

    fn chat(&mut self) -> Ask {
        let free = (0..CONVERSATIONS).filter(|&it| !self.conversations[it].is_open);
        let free: Vec<usize> = free.collect();
        let Some(&index) = free.choose(&mut self.rng) else {
            return self.fresh(Kind::Alone);
        };
        let question = self.rng.random_range(3..=(self.lengths.prompt / 16).max(3));
        let question = self.text(question);
        let system = self.systems[self.rng.random_range(0..SYSTEM_PROMPTS)].clone();
        let conversation = &mut self.conversations[index];
        // Room for this turn, after a tokenizer that is no good at these words.
        let is_long = conversation.prompt_tokens > self.lengths.prompt / 2;
        if conversation.messages.len() > 2 * MOST_TURNS || is_long {
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

    fn completion(&mut self, kind: Kind, prompt: Value) -> Ask {
        self.ask(kind, "/v1/completions", "prompt", prompt)
    }

    fn ask(&mut self, kind: Kind, path: &'static str, field: &str, prompt: Value) -> Ask {
        let streams = self.rng.random_bool(self.stream_share);
        // Mostly short, for there to be many prompts in little time.
        let most = self.rng.random_range(1..=self.lengths.answer.max(1));
        let tokens = self.rng.random_range(1..=most);
        let leaves = streams && tokens > 2 && self.rng.random_bool(self.abort_share);
        let leaves_after = leaves.then(|| self.rng.random_range(1..tokens));
        let mut body = json!({
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": true,
            "stream": streams,
        });
        body[field] = prompt;
        if streams {
            body["stream_options"] = json!({"include_usage": true});
        }
        Ask {
            kind,
            path,
            body: Bytes::from(body.to_string()),
            streams,
            leaves_after,
            conversation: None,
        }
    }

    fn ids(&mut self, count: u32) -> Vec<u32> {
        let ids = (0..count).map(|_| self.rng.random_range(FIRST_ID..LAST_ID));
        ids.collect()
    }

    /// About so many tokens of text.
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

    fn script(abort_share: f64) -> Script {
        let lengths = Lengths {
            prompt: 600,
            answer: 40,
        };
        Script::new(7, "m".to_owned(), 16, lengths, 0.6, abort_share)
    }

    fn prompt(ask: &Ask) -> Value {
        let body: Value = serde_json::from_slice(&ask.body).unwrap();
        body["prompt"].clone()
    }

    #[test]
    fn every_kind_occurs_and_keeps_its_promise() {
        let mut script = script(0.2);
        let mut seen = Vec::new();
        let mut left = 0;
        for _ in 0..400 {
            let ask = script.next();
            let prompt = prompt(&ask);
            let length = prompt.as_array().map(Vec::len);
            assert!(length.is_none_or(|length| (1..=600).contains(&length)));
            match ask.kind {
                Kind::Aligned => assert_eq!(length.unwrap() % 16, 0),
                Kind::Repeat => assert!(seen.contains(&prompt)),
                _ => {}
            }
            left += usize::from(ask.leaves_after.is_some());
            assert!(ask.streams || ask.leaves_after.is_none());
            script.answered(&ask, Some(("answer".to_owned(), 50)));
            seen.push(prompt);
        }
        assert!((10..120).contains(&left), "{left}");
    }

    #[test]
    fn conversations_grow_by_their_answers_and_one_turn_at_a_time() {
        let mut script = script(0.0);
        let mut turns = Vec::new();
        while turns.len() < 200 {
            let ask = script.next();
            if ask.kind == Kind::Chat {
                let body: Value = serde_json::from_slice(&ask.body).unwrap();
                turns.push(body["messages"].as_array().unwrap().len());
                let open = script.conversations.iter().filter(|it| it.is_open);
                assert_eq!(open.count(), 1);
                script.answered(&ask, Some(("answer".to_owned(), 10)));
            }
        }
        assert!(
            turns.iter().all(|&length| length % 2 == 0),
            "system, then turns"
        );
        assert!(turns.iter().any(|&length| length >= 8));
    }

    #[test]
    fn a_turn_without_an_answer_ends_its_conversation() {
        let mut script = script(0.0);
        for _ in 0..200 {
            let ask = script.next();
            script.answered(&ask, None);
        }
        assert!(script.conversations.iter().all(|it| it.messages.is_empty()));
    }
}
