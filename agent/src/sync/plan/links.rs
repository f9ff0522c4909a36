//! Which links may travel: only those that stay in the workspace.
//!
//! A link to somewhere else means another file on each member, and one that another member made may
//! point at what is nobody else's business; programs that follow it would read or write there. So
//! it is neither sent nor placed, and told. The engine itself never follows a link.

use cortex_shared::entry::Entry;
use cortex_shared::wire_path::WirePath;

/// Whether an entry at `path` is a link whose target is absolute, or leaves the root as written.
pub(in crate::sync) fn leaves_workspace(path: &WirePath, entry: Option<&Entry>) -> bool {
    entry.is_some_and(|entry| entry.leads_outside(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_stay_inside_as_written_may_travel_and_no_others() {
        for (path, target, leaves) in [
            ("a", "b", false),
            ("a", "./b/../c", false),
            ("a", "..", true),
            ("a", "../root/a", true),
            ("d/a", "..", false),
            ("d/a", "../b", false),
            ("d/a", "../../b", true),
            ("d/a", "x/../../../b", true),
            ("d/a", "/etc/passwd", true),
            ("d/a", "", false),
            ("d/e/a", "../..//./b/", false),
        ] {
            let entry = Entry::Link { target: target.as_bytes().to_vec().into() };
            let path = WirePath::new(path).unwrap();
            assert_eq!(leaves_workspace(&path, Some(&entry)), leaves, "{path} -> {target}");
        }
        let path = WirePath::new("a").unwrap();
        assert!(!leaves_workspace(&path, Some(&Entry::Dir)) && !leaves_workspace(&path, None));
    }
}
