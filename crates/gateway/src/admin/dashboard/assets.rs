//! Files of the page, which are part of the program.

use std::sync::LazyLock;

use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use sha2::{Digest, Sha256};

use crate::reply::{self, Body};

/// Path of the page.
const PAGE: &str = "/dashboard";

/// Content security policy: the page loads only its own files and the admin API.
const POLICY: &str = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'";

/// A file of the page.
struct Asset {
    /// Path below the page; empty for the page itself.
    name: &'static str,
    content_type: &'static str,
    content: &'static [u8],
}

/// Declares the files of the folder `assets`.
macro_rules! assets {
    ($($name:literal = $file:literal, $content_type:literal;)*) => {
        const ASSETS: &[Asset] = &[$(Asset {
            name: $name,
            content_type: $content_type,
            content: include_bytes!(concat!("assets/", $file)),
        }),*];
    };
}

assets! {
    "" = "index.html", "text/html; charset=utf-8";
    "/style.css" = "style.css", "text/css; charset=utf-8";
    "/icon.svg" = "icon.svg", "image/svg+xml";
    "/app.js" = "app.js", "text/javascript; charset=utf-8";
    "/connection.js" = "connection.js", "text/javascript; charset=utf-8";
    "/dom.js" = "dom.js", "text/javascript; charset=utf-8";
    "/format.js" = "format.js", "text/javascript; charset=utf-8";
    "/overview.js" = "overview.js", "text/javascript; charset=utf-8";
    "/fleet.js" = "fleet.js", "text/javascript; charset=utf-8";
    "/chart.js" = "chart.js", "text/javascript; charset=utf-8";
    "/charts.js" = "charts.js", "text/javascript; charset=utf-8";
    "/decisions.js" = "decisions.js", "text/javascript; charset=utf-8";
    "/quality.js" = "quality.js", "text/javascript; charset=utf-8";
}

/// Entity tags of the files, in their order.
static TAGS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let tag = |asset: &Asset| {
        let digest = Sha256::digest(asset.content);
        let hex: String = digest
            .iter()
            .take(8)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!("\"{hex}\"")
    };
    ASSETS.iter().map(tag).collect()
});

/// Returns whether a path belongs to the page. Such paths have no secrets.
pub(in crate::admin) fn is_page(path: &str) -> bool {
    path.strip_prefix(PAGE)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Returns the file at a path, or a 304 if the client has it; `None` if there is no such file.
pub(super) fn respond(path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
    let name = path.strip_prefix(PAGE)?;
    let index = ASSETS.iter().position(|asset| asset.name == name)?;
    let (asset, tag) = (&ASSETS[index], &TAGS[index]);
    let known = headers.get_all(IF_NONE_MATCH).iter();
    let is_known = known
        .filter_map(|tags| tags.to_str().ok())
        .flat_map(|tags| tags.split(','))
        .any(|known| matches!(known.trim().trim_start_matches("W/"), known if known == tag || known == "*"));
    let mut response = match is_known {
        true => reply::whole(StatusCode::NOT_MODIFIED, asset.content_type, ""),
        false => reply::whole(StatusCode::OK, asset.content_type, asset.content),
    };
    let headers = response.headers_mut();
    if let Ok(tag) = HeaderValue::from_str(tag) {
        headers.insert(ETAG, tag);
    }
    for (name, value) in [
        (CACHE_CONTROL, "no-cache"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    Some(response)
}
