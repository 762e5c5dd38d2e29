//! The frame of all HTML pages. A page is one file without external resources.

use crate::chart::escaped;

const STYLE: &str = include_str!("page.css");

/// Returns a complete page with a title and an HTML body. `class` is the class of the `body`
/// element. Only the title is escaped; `body` starts below the heading with the title.
pub fn framed(title: &str, class: &str, body: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>{title}</title><style>{STYLE}</style></head>\
         <body class=\"{class}\"><h1>{title}</h1>{body}</body></html>"
    )
}
