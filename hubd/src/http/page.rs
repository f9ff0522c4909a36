//! The web page: files that are part of the program, the same for everybody. They hold nothing of the
//! mesh: what is shown the page asks the API for, as whoever is logged in.
//!
//! There is no build step and nobody else's code: what stands in `page/` is what browsers get. The policy
//! they get with it lets them run, load and ask nothing but what comes from here, and makes text that is
//! put in as markup an error; so does the code, which makes elements in `dom.js` only.

use std::sync::LazyLock;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use sha2::Digest as _;

/// What browsers let the page do.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file of the page.
struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

macro_rules! files {
    ($($path:literal $kind:expr, $file:literal;)+) => {
        [$(File { path: $path, kind: $kind, text: include_str!(concat!("page/", $file)) }),+]
    };
}

static FILES: [File; 17] = files! {
    "/" HTML, "index.html";
    // The code of a login link stands behind its `#`, which browsers do not send: a script posts it, so
    // that nobody who merely looks at the link (a chat's preview) uses it up.
    "/login" HTML, "login.html";
    "/page/style.css" "text/css; charset=utf-8", "style.css";
    "/page/icon.svg" "image/svg+xml", "icon.svg";
    "/page/main.js" SCRIPT, "main.js";
    "/page/login.js" SCRIPT, "login.js";
    "/page/api.js" SCRIPT, "api.js";
    "/page/live.js" SCRIPT, "live.js";
    "/page/dom.js" SCRIPT, "dom.js";
    "/page/format.js" SCRIPT, "format.js";
    "/page/parts.js" SCRIPT, "parts.js";
    "/page/terminal.js" SCRIPT, "terminal.js";
    "/page/history.js" SCRIPT, "history.js";
    "/page/nodes.js" SCRIPT, "nodes.js";
    "/page/policy.js" SCRIPT, "policy.js";
    "/page/tasks.js" SCRIPT, "tasks.js";
    "/page/workspaces.js" SCRIPT, "workspaces.js";
};

/// The tags of all files: those of one version of the hub. One tag, so that a browser that has the scripts
/// of the version before gets all of them anew.
static TAG: LazyLock<HeaderValue> = LazyLock::new(|| {
    let mut hash = sha2::Sha256::new();
    for file in &FILES {
        hash.update(file.text);
    }
    tag_of(&hash.finalize())
});

/// Routes of all files.
pub(super) fn routes(mut router: Router) -> Router {
    for file in &FILES {
        router = router
            .route(file.path, get(move |headers: HeaderMap| async move { send(file, &headers) }));
    }
    router
}

fn send(file: &File, request: &HeaderMap) -> Response<Body> {
    let known = has(request, &TAG);
    let mut response = Response::new(Body::from(if known { "" } else { file.text }));
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    headers.insert(ETAG, TAG.clone());
    for (name, value) in [
        (CONTENT_TYPE, file.kind),
        // Asked about each time: another version of the hub has other scripts.
        (CACHE_CONTROL, "no-cache"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// The tag of a content with this SHA-256.
pub(super) fn tag_of(sha256: &[u8]) -> HeaderValue {
    let hex: String = sha256.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    HeaderValue::from_str(&format!("\"{hex}\"")).expect("hexadecimal digits and quotes are visible")
}

/// Whether whoever asks has this already.
pub(super) fn has(request: &HeaderMap, tag: &HeaderValue) -> bool {
    let Ok(tag) = tag.to_str() else { return false };
    let known = request.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    known.flat_map(|tags| tags.split(',')).any(|one| {
        let one = one.trim();
        one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn every_file_of_the_page_is_served_and_every_one_that_is_named_is_there() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http/page");
        let there: BTreeSet<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let names = FILES.iter().map(|file| match file.path {
            "/" => "index.html".to_owned(),
            "/login" => "login.html".to_owned(),
            path => path.strip_prefix("/page/").unwrap().to_owned(),
        });
        let served: BTreeSet<String> = names.collect();
        assert_eq!(served, there);
        for file in &FILES {
            let named = file
                .text
                .split('"')
                .filter_map(|part| part.strip_prefix("./").or_else(|| part.strip_prefix("/page/")));
            for name in named {
                assert!(served.contains(name), "{} names {name}", file.path);
            }
        }
    }

    #[test]
    fn nothing_of_the_page_is_from_elsewhere_inline_or_markup_out_of_text() {
        for file in &FILES {
            let text = file.text.replace("http://www.w3.org/2000/svg", "");
            for never in [
                "http://",
                "https://",
                "innerHTML",
                "outerHTML",
                "insertAdjacent",
                "document.write",
                "eval(",
                "new Function",
                " style=",
                "<style",
                " onclick=",
                "javascript:",
                "@import",
            ] {
                assert!(!text.contains(never), "{} has {never}", file.path);
            }
            // Scripts are files.
            assert_eq!(text.matches("<script").count(), text.matches("src=\"/page/").count());
        }
    }

    #[test]
    fn whoever_has_it_is_not_sent_it_again() {
        let tag = TAG.to_str().unwrap().to_owned();
        for (shown, known) in [
            (tag.clone(), true),
            (format!("\"x\", {tag}"), true),
            (format!("W/{tag}"), true),
            ("*".to_owned(), true),
            ("\"x\"".to_owned(), false),
            (tag.trim_matches('"').to_owned(), false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(IF_NONE_MATCH, HeaderValue::from_str(&shown).unwrap());
            let response = send(&FILES[0], &headers);
            assert_eq!(response.status() == StatusCode::NOT_MODIFIED, known, "{shown}");
            assert!(response.headers().contains_key(CONTENT_SECURITY_POLICY));
        }
        assert_eq!(send(&FILES[0], &HeaderMap::new()).status(), 200);
    }
}
