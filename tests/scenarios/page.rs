//! The hub's web page in a real browser: what it shows, what it lets an administrator do, and that nothing
//! of what it shows is ever carried out.

use cortex_tests::browser::Browser;
use cortex_tests::mesh::{As, Mesh, Node, Operator};
use cortex_tests::process::Outcome;
use cortex_tests::wait::until;

/// What would leave a mark if it were markup, and steers terminals in every way that counts: colours, the
/// title, the clipboard, a link, a sequence without an end, text that runs backwards.
const HOSTILE: &str = "printf '<img src=x onerror=window.pwned=1><script>window.pwned=2</script>\\n'; \
     printf '\\033[31mred\\033[0m \\033]0;title\\007\\033]52;c;aGk=\\007\\033]8;;https://evil.example\\033\\\\link\\n'; \
     printf 'abc\\342\\200\\256def\\n10%%\\r100%%\\n\\033]never ending\\nafter\\n'";

/// What of this is left.
const HARMLESS: &str = "<img src=x onerror=window.pwned=1><script>window.pwned=2</script>\n\
                        red link\nabc\u{fffd}def\n100%\n\nafter";

/// A mesh with something in it, and a browser where an operator is logged in.
struct Page {
    // Ends first: its files are in the mesh's scratch directory.
    browser: Browser,
    south: Node,
    admin: Operator,
    mesh: Mesh,
}

impl Page {
    /// `None` if there is no browser here.
    fn new() -> Option<Self> {
        let mut mesh = Mesh::start();
        let Some(browser) = Browser::start(&mesh.path("")) else {
            eprintln!("skipped: there is no chromium with its driver (scripts/setup chromium)");
            return None;
        };
        let admin = mesh.operator("admin");
        let south = mesh.node("south", As::Me);
        let page = Self { browser, south, admin, mesh };
        page.browser.resize(1280, 800);
        Some(page)
    }

    /// Runs this in every page before its own scripts.
    fn before_each_page(&self, script: &str) {
        let source = serde_json::json!({ "source": script });
        self.browser.tell("Page.addScriptToEvaluateOnNewDocument", &source);
    }

    /// Logs somebody in by a link.
    fn log_in(&self, operator: &Operator) {
        let link = operator.agent(&["login-link", "-o", "json"]).ok().json();
        // Another address than the page's own, so that the link is opened anew.
        self.browser.open("about:blank");
        self.browser.open(link["url"].as_str().unwrap());
        self.browser.wait("document.querySelector('h1')?.textContent === 'Nodes'");
    }

    /// Goes to a view, and waits until this is true there.
    fn view(&self, hash: &str, there: &str) {
        let _gone = self.browser.script(&format!("location.hash = {hash:?}"));
        self.browser.wait(there);
    }

    /// Nothing that was shown has been carried out, and no policy was broken.
    fn unharmed(&self) {
        let marks = "return [window.pwned ?? null, document.querySelectorAll('main img, main script').length]";
        assert_eq!(self.browser.script(marks), serde_json::json!([null, 0]));
        let said = self.browser.said();
        for word in ["Content Security Policy", "Trusted", "Uncaught"] {
            assert!(!said.iter().any(|line| line.contains(word)), "{said:?}");
        }
    }

    /// A picture at both sizes; nothing lies beside a narrow screen.
    fn pictures(&self, name: &str) {
        for (width, height) in [(1280, 800), (390, 844)] {
            self.browser.resize(width, height);
            let fits = format!("document.documentElement.scrollWidth <= {width}");
            self.browser.wait(&fits);
            self.browser.picture(&format!("{name}-{width}"));
        }
        self.browser.resize(1280, 800);
    }
}

#[test]
fn the_page_shows_what_nodes_say_as_text_and_goes_on_showing_it() {
    let Some(page) = Page::new() else { return };
    let Page { mesh, admin, browser, .. } = &page;
    let _made: Outcome = admin.agent(&["workspace", "create", "demo"]).ok();
    let _attached: Outcome = admin.agent(&["workspace", "attach", "demo", "--node", "south"]).ok();
    let root = page.south.workspace("demo");
    until("the workspace is there", || root.exists());
    std::fs::write(root.join("<img src=x onerror=window.pwned=3>.txt"), "x").unwrap();
    let _ran: Outcome = admin.agent(&["exec", "south", "-s", HOSTILE]).ok();

    page.log_in(admin);
    assert_eq!(browser.script("return location.hash"), "#/nodes");
    browser.wait("document.querySelector('tbody a')?.textContent === 'south'");
    page.pictures("nodes");

    let terminal = "document.querySelector('.terminal')?.innerText";
    page.view("#/nodes/south", &format!("{terminal}.includes('after')"));
    assert!(browser.text(".terminal").contains(HARMLESS), "{}", browser.text(".terminal"));
    let title = browser.script("return document.title");
    assert_eq!(title, "south · cortex mesh");
    // What comes later is shown by itself.
    let _ran: Outcome = admin.agent(&["exec", "south", "-s", "echo later; echo bad >&2"]).ok();
    browser.wait(&format!("{terminal}.includes('later')"));
    browser.wait("document.querySelector('.terminal .stderr')?.innerText.includes('bad')");
    page.pictures("node");

    page.view("#/tasks", "document.querySelectorAll('tbody tr').length === 2");
    page.pictures("tasks");
    let task = browser.script("return document.querySelectorAll('tbody a')[2].hash");
    page.view(task.as_str().unwrap(), &format!("{terminal}.includes('after')"));
    page.pictures("task");

    let changed = "document.querySelector('main').innerText.includes('onerror=window.pwned=3')";
    page.view("#/workspaces", "document.querySelector('tbody a')?.textContent === 'demo'");
    page.view("#/workspaces/demo", changed);
    page.pictures("workspace");

    // A member that is under way, as it would be for a moment only.
    let _set = browser.script(
        "const ask = window.fetch; window.fetch = async (path, options) => { \
           const answer = await ask(path, { ...options, headers: {} }); \
           if (!path.endsWith('/workspaces/demo')) return answer; \
           const shown = await answer.json(); const { status } = shown.workspace.members[0]; \
           Object.assign(status, { state: 'downloading', bytes_done: 3e8, bytes_total: 1e9, \
             bytes_per_second: 5e6, eta_ms: 140000, held_deletions: 2, \
             problems: [{ path: '<b>', code: 'busy', message: 'is open', first_seen_ms: 1 }] }); \
           return new Response(JSON.stringify(shown), \
             { headers: { 'content-type': 'application/json' } }); }",
    );
    browser.wait("document.querySelector('progress')?.value === 3e8");
    browser
        .wait("document.querySelector('td').closest('tr').innerText.includes('2 min 20 s left')");
    page.pictures("progress");

    // Worse than the hub lets anybody be called, as if it did.
    let _set = browser.script(
        "const ask = window.fetch; window.fetch = async (path, options) => { \
           const answer = await ask(path, { ...options, headers: {} }); \
           if (!path.includes('/nodes?')) return answer; \
           const text = JSON.stringify(await answer.json()).replaceAll('south', \
             '</a><img src=x onerror=window.pwned=4>javascript:1\\u202e'); \
           return new Response(text, { headers: { 'content-type': 'application/json' } }); }",
    );
    page.view("#/nodes", "document.querySelector('tbody a')?.textContent.includes('pwned=4')");
    let link = browser.script("return document.querySelector('tbody a').getAttribute('href')");
    assert!(link.as_str().unwrap().starts_with("#/nodes/%3C%2Fa%3E%3Cimg"), "{link}");
    page.pictures("hostile");
    page.unharmed();

    // What is not there is said, with what helps; this loads the page anew.
    let gone = format!("https://{}/#/nodes/nowhere", mesh.http());
    browser.open("about:blank");
    browser.open(&gone);
    browser.wait("document.querySelector('.problem')?.innerText.includes('node_not_found')");
    page.pictures("problem");
}

#[test]
fn an_administrator_lets_a_node_do_more_for_a_reason_and_a_time_and_a_viewer_does_not() {
    let Some(mut page) = Page::new() else { return };
    let viewer = page.mesh.operator("viewer");
    let _set: Outcome = page.south.agent(&["ceiling", "set", "permissive"]).ok();
    page.log_in(&page.admin);
    let browser = &page.browser;
    page.view("#/nodes/south", "document.querySelector('.panel button.danger')");
    browser.click(".panel button.danger");
    // Blanks are no reason: the hub says so, in the dialog.
    browser.type_into("#reason", " ");
    browser.click("dialog button[type=submit]");
    browser.wait("document.querySelector('dialog .problem')?.innerText.includes('reason_needed')");
    page.pictures("refused");
    let reason = "the <b>new</b> driver";
    browser.type_into("#reason", reason);
    browser.click("dialog button[type=submit]");
    browser.wait("!document.querySelector('dialog') && document.querySelector('.countdown')");
    let before = browser.text(".countdown");
    assert!(before.starts_with("29 min ") || before.starts_with("30 min "), "{before}");
    // It counts down by itself.
    browser.wait(&format!("document.querySelector('.countdown').innerText !== {before:?}"));
    assert_eq!(browser.text(".panel q").trim_matches(['“', '”', '"']), reason);
    browser.wait("document.querySelector('.panel h2 .warn')?.innerText.startsWith('PERMISSIVE')");
    page.pictures("permissive");
    browser.tell(
        "Emulation.setEmulatedMedia",
        &serde_json::json!({ "features": [{ "name": "prefers-color-scheme", "value": "dark" }] }),
    );
    page.pictures("permissive-dark");
    let shown = page.mesh.shown("south");
    assert_eq!(shown["policy_reason"], reason, "{shown}");

    browser.click(".panel button:not(.danger)");
    browser.click("dialog button[type=submit]");
    browser.wait("!document.querySelector('dialog') && !document.querySelector('.countdown')");
    assert_eq!(page.mesh.shown("south")["policy"], "strict");
    page.unharmed();

    // A command that nobody waits for is ended.
    let sleep = ["exec", "south", "--detach", "-o", "json", "--", "sleep", "1000"];
    let begun = page.admin.agent(&sleep).ok().json();
    let task = begun["task_id"].as_str().unwrap();
    let there = "document.querySelector('h1')?.innerText.startsWith('Task') && \
                 document.querySelector('main button.danger')";
    page.view(&format!("#/tasks/{task}"), there);
    browser.click("main button.danger");
    browser.click("dialog button[type=submit]");
    browser.wait("document.querySelector('h1 .badge')?.innerText === 'cancelled'");
    page.pictures("cancelled");

    browser.click("#who button");
    browser.wait("document.querySelector('h1')?.textContent === 'Log in'");
    page.pictures("logged-out");
    page.log_in(&viewer);
    page.view("#/nodes/south", "document.querySelector('.panel')");
    assert_eq!(browser.script("return document.querySelectorAll('.panel button').length"), 0);

    // A hub that is away is said to be, and one that comes back has forgotten who was logged in.
    page.mesh.kill_hub();
    page.browser.wait("document.querySelector('#notice .bad')");
    page.pictures("away");
    page.mesh.start_hub();
    page.browser.wait("document.querySelector('h1')?.textContent === 'Log in'");
}

#[test]
fn the_page_shows_conflicts_and_nodes_that_are_gone() {
    let Some(page) = Page::new() else { return };
    let mut north = page.mesh.node("north", As::Me);
    let _made: Outcome = page.admin.agent(&["workspace", "create", "w"]).ok();
    for node in ["south", "north"] {
        let attach = ["workspace", "attach", "w", "--node", node];
        let _attached: Outcome = page.admin.agent(&attach).ok();
    }
    let (a, b) = (page.south.workspace("w"), north.workspace("w"));
    until("the workspace is there", || a.exists() && b.exists());
    std::fs::write(a.join("notes.txt"), "common").unwrap();
    until("the file arrived", || b.join("notes.txt").exists());
    let settle = ["workspace", "status", "w", "--watch"];
    let _settled: Outcome = page.admin.agent(&settle).ok();

    page.log_in(&page.admin);
    let browser = &page.browser;
    page.view("#/workspaces", "document.querySelector('.badge')?.innerText === 'in step'");
    north.stop();
    // It is seen without asking anew.
    page.view("#/nodes", "document.querySelectorAll('tbody tr').length === 2");
    browser.wait("document.querySelector('.badge.off')?.innerText === 'offline'");
    page.pictures("offline");
    browser.type_into("#wanted", "nor");
    browser.wait("document.querySelectorAll('tbody tr').length === 1");
    std::fs::write(a.join("notes.txt"), "edited on south").unwrap();
    std::fs::write(b.join("notes.txt"), "edited on north").unwrap();
    page.view(
        "#/workspaces/w",
        "document.querySelector('h1 .badge')?.innerText.includes('behind')",
    );
    north.run();
    browser.wait(
        "[...document.querySelectorAll('caption')].some((caption) => \
         caption.innerText.includes('1 file changed in two places'))",
    );
    page.pictures("conflict");
    page.unharmed();
}

/// Without its clock, nothing is asked for because it is time: timers of half a second and more never end.
const WITHOUT_A_CLOCK: &str = "const real = window.setTimeout; window.asked = []; \
     window.setTimeout = (then, ms, ...more) => ms >= 500 ? 0 : real(then, ms, ...more); \
     const ask = window.fetch; \
     window.fetch = (path, options) => { window.asked.push(String(path)); return ask(path, options); };";

#[test]
fn the_page_hears_what_happens_and_asks_for_what_that_touches() {
    let Some(page) = Page::new() else { return };
    let north = page.mesh.node("north", As::Me);
    page.before_each_page(WITHOUT_A_CLOCK);
    page.log_in(&page.admin);
    let browser = &page.browser;
    browser.wait("document.querySelectorAll('tbody tr').length === 2");
    browser.wait("document.querySelector('#live')?.textContent === 'live'");
    page.pictures("live");
    let row = |name: &str| format!("document.querySelector('tr:has(a[href=\"#/nodes/{name}\"])')");
    let label = ["node", "label", "south", "shelf=3"];
    let _labelled: Outcome = page.admin.agent(&label).ok();
    browser.wait(&format!("{}.innerText.includes('shelf=3')", row("south")));
    drop(north);
    browser.wait(&format!("{}.innerText.includes('offline')", row("north")));

    // What happens to one node is nothing to the view of another; the foot counts it all the same.
    page.view("#/nodes/south", "document.querySelector('h1')?.innerText.startsWith('south')");
    let script = "echo first; echo go-on; sleep 1000";
    let detach = ["exec", "south", "--detach", "-o", "json", "-s", script];
    let begun = page.admin.agent(&detach).ok().json();
    let task = begun["task_id"].as_str().unwrap();
    browser.wait("document.querySelector('#foot').innerText.includes('1 running')");
    let badge = "[...document.querySelectorAll('tbody .badge')].map((badge) => badge.innerText)";
    browser.wait(&format!("{badge}.includes('running')"));
    let asked = "const of = (end) => window.asked.filter((one) => one.endsWith(end)).length; \
                 return of('/hub') - of('/nodes/south')";
    let before = browser.script(asked).as_i64().unwrap();
    let mut shelf = 3;
    until("the foot is asked for alone", || {
        shelf += 1;
        let label = format!("shelf={shelf}");
        let _labelled: Outcome = page.admin.agent(&["node", "label", "north", &label]).ok();
        browser.script(asked).as_i64().unwrap() > before
    });

    // Output of a task comes by its own stream, and so does its end.
    let terminal = "document.querySelector('.terminal')?.innerText";
    page.view(&format!("#/tasks/{task}"), &format!("{terminal}.includes('go-on')"));
    let cancel = ["task", "cancel", task];
    let _cancelled: Outcome = page.admin.agent(&cancel).ok();
    browser.wait("document.querySelector('h1 .badge')?.innerText === 'cancelled'");
    browser
        .wait("document.querySelector('.output [role=status]').innerText.startsWith('ended at')");
    page.unharmed();
}

#[test]
fn a_page_that_cannot_listen_asks_and_says_so() {
    let Some(page) = Page::new() else { return };
    page.before_each_page("delete window.EventSource");
    page.log_in(&page.admin);
    let browser = &page.browser;
    browser.wait("document.querySelector('#live')?.textContent.startsWith('asks every 2 s')");
    let label = ["node", "label", "south", "shelf=3"];
    let _labelled: Outcome = page.admin.agent(&label).ok();
    browser.wait("document.querySelector('tbody')?.innerText.includes('shelf=3')");
    let detach = ["exec", "south", "--detach", "-o", "json", "-s", "echo said"];
    let begun = page.admin.agent(&detach).ok().json();
    let task = begun["task_id"].as_str().unwrap();
    let terminal = "document.querySelector('.terminal')?.innerText";
    page.view(&format!("#/tasks/{task}"), &format!("{terminal}.includes('said')"));
    browser
        .wait("document.querySelector('.output [role=status]').innerText.startsWith('ended at')");
    page.unharmed();
}
