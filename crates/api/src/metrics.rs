//! Names of the metrics that clients of the gateway read. `docs/metrics.md` lists all metrics.

/// Counter of responses whose number of prompt tokens was compared with the router's tokenizer. Its
/// label `result` is `equal` or `different`.
pub const TOKEN_PARITY: &str = "foresee_token_parity_total";
