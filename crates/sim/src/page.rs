//! What all pages have in common: one file that needs nothing else.

use crate::chart::escaped;

const STYLE: &str = include_str!("page.css");

/// A whole page. `class` is the body's.
pub(crate) fn framed(title: &str, class: &str, body: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style></head>\
         <body class=\"{class}\"><h1>{title}</h1>{body}</body></html>"
    )
}
