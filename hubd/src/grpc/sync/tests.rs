//! The service over a real connection, with real packs.

use std::collections::{HashMap, HashSet};
use std::future::Future as _;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::task::{Context, Waker};

use cortex_proto::v1::sync_client::SyncClient;
use cortex_shared::chunk::{ChunkRef, Cutter};
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::ids::CommitId;
use cortex_shared::pack::{MAX_RAW_BYTES, Pack, PackBuilder, Pushed};
use cortex_shared::tasks::TaskScope;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::InterceptorLayer;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Server};

use super::*;
use crate::sync::ContentLimits;

/// Header by which these tests say who calls; in the hub it is the certificate.
const NODE_HEADER: &str = "test-node";

#[derive(Default)]
struct Members(Mutex<HashSet<(NodeId, WorkspaceId)>>);

impl Membership for Members {
    fn is_member(&self, node: NodeId, workspace: WorkspaceId) -> bool {
        self.0.lock().unwrap().contains(&(node, workspace))
    }

    fn workspace_name(&self, _: WorkspaceId) -> Option<String> {
        Some("code".into())
    }
}

struct Fixture {
    _folder: tempfile::TempDir,
    scope: TaskScope,
    members: Arc<Members>,
    workspaces: Arc<Workspaces>,
    registry: Arc<Registry>,
    events: Arc<EventBus>,
    address: SocketAddr,
    id: WorkspaceId,
}

type Inject = Box<dyn FnMut(Request<()>) -> Result<Request<()>, Status> + Send>;

/// A member as its agent would be.
struct Caller {
    client: SyncClient<InterceptedService<Channel, Inject>>,
    node: NodeId,
    id: WorkspaceId,
}

impl Fixture {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scope = TaskScope::new();
        let workspaces =
            Workspaces::open(folder.path(), ContentLimits::default(), scope.clone(), scope.clone())
                .unwrap();
        let members = Arc::new(Members::default());
        let workspaces = Arc::new(workspaces);
        let registry = Arc::new(Registry::new(Vec::new()));
        let events = EventBus::in_memory(Default::default());
        let service =
            SyncService::new(workspaces.clone(), members.clone(), registry.clone(), events.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let identify = |mut request: Request<()>| {
            if let Some(node) = request.metadata().get(NODE_HEADER) {
                let node_id = node.to_str().unwrap().parse().unwrap();
                request.extensions_mut().insert(AdmittedNode { node_id });
            }
            Ok(request)
        };
        let stop = scope.token().clone().cancelled_owned();
        let server = Server::builder()
            .layer(InterceptorLayer::new(identify))
            .add_service(service.into_server())
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop);
        scope.spawn("server", async move { server.await.unwrap() });
        Self {
            _folder: folder,
            scope,
            members,
            workspaces,
            registry,
            events,
            address,
            id: WorkspaceId::new(),
        }
    }

    /// A connection of its own, as each node has.
    fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    /// Calls as a node that is no member.
    fn stranger(&self) -> Caller {
        let node = NodeId::new();
        let value = node.to_string().parse().unwrap();
        let inject: Inject = Box::new(move |mut request| {
            request.metadata_mut().insert(NODE_HEADER, Clone::clone(&value));
            Ok(request)
        });
        let client = SyncClient::with_interceptor(self.channel(), inject)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Caller { client, node, id: self.id }
    }

    fn member(&self) -> Caller {
        let caller = self.stranger();
        self.members.0.lock().unwrap().insert((caller.node, self.id));
        caller
    }

    async fn close(self) {
        self.scope.cancel();
        self.scope.finish().await;
    }
}

fn concatenated(hashes: &[Digest]) -> Bytes {
    hashes.iter().flat_map(|hash| *hash.as_bytes()).collect::<Vec<u8>>().into()
}

impl Caller {
    fn workspace_id(&self) -> Bytes {
        self.id.as_bytes().to_vec().into()
    }

    async fn head(&mut self) -> Result<v1::HeadResponse, Status> {
        let workspace_id = self.workspace_id();
        Ok(self.client.head(v1::HeadRequest { workspace_id, known: None }).await?.into_inner())
    }

    async fn have(&mut self, chunks: &[Digest]) -> Result<Bytes, Status> {
        let chunks = concatenated(chunks);
        let request = v1::HaveRequest { workspace_id: self.workspace_id(), chunks };
        Ok(self.client.have(request).await?.into_inner().bitmap)
    }

    async fn put(&mut self, packs: Vec<Bytes>) -> Result<Vec<v1::PutPackAck>, Status> {
        let workspace_id = self.workspace_id();
        let puts = packs
            .into_iter()
            .map(move |pack| v1::PutPack { workspace_id: workspace_id.clone(), pack });
        self.client.put_packs(stream::iter(puts)).await?.into_inner().try_collect().await
    }

    async fn commit(&mut self, ops: Vec<v1::Op>) -> Result<v1::CommitResponse, Status> {
        let epoch = self.head().await?.epoch;
        let commit_id = CommitId::new().as_bytes().to_vec().into();
        let request = v1::CommitRequest {
            rules: None,
            workspace_id: self.workspace_id(),
            commit_id,
            epoch,
            ops,
            known: None,
        };
        Ok(self.client.commit(request).await?.into_inner())
    }

    async fn changes(&mut self, after_seq: u64) -> Result<Vec<v1::ChangesPage>, Status> {
        let request =
            v1::ChangesRequest { workspace_id: self.workspace_id(), after_seq, known: None };
        self.client.changes(request).await?.into_inner().try_collect().await
    }

    async fn get(&mut self, chunks: &[Digest]) -> Result<Vec<v1::Pack>, Status> {
        let chunks = concatenated(chunks);
        let request = v1::GetPacksRequest { workspace_id: self.workspace_id(), chunks };
        self.client.get_packs(request).await?.into_inner().try_collect().await
    }

    async fn ack(&mut self, seq: u64) -> Result<(), Status> {
        let epoch = self.head().await?.epoch;
        let request = v1::AckAppliedRequest { workspace_id: self.workspace_id(), epoch, seq };
        self.client.ack_applied(request).await.map(|_| ())
    }
}

fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Cuts and packs content as an agent does.
fn packed(contents: &[&[u8]]) -> (Vec<Bytes>, Vec<v1::FileEntry>) {
    let mut builder = PackBuilder::new(1).unwrap();
    let mut packs = Vec::new();
    let mut files = Vec::new();
    for content in contents {
        let cut = Cutter::new()
            .cut(*content, |chunk, data| {
                if builder.push(chunk, data) == Pushed::Full {
                    packs.extend(builder.finish().map(|(_, pack)| pack));
                    assert_eq!(builder.push(chunk, data), Pushed::Added);
                }
                Ok::<_, std::convert::Infallible>(())
            })
            .unwrap();
        files.push(v1::FileEntry {
            content: convert::wire_digest(&cut.content),
            size: cut.size,
            executable: false,
            mtime_ns: 1,
            recipe: cut.recipe.encode().into(),
        });
    }
    packs.extend(builder.finish().map(|(_, pack)| pack));
    (packs, files)
}

fn create(path: &str, kind: v1::entry::Kind) -> v1::Op {
    let new = Some(v1::Entry { kind: Some(kind) });
    v1::Op { path: path.to_owned().into(), new, ..Default::default() }
}

fn code(status: &Status) -> &str {
    status.metadata().get(cortex_proto::CODE_TRAILER).map_or("", |code| code.to_str().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_of_one_member_arrives_at_another_byte_for_byte() {
    let fixture = Fixture::new().await;
    let (mut sender, mut receiver) = (fixture.member(), fixture.member());
    let large = noise(1, 9 * 1024 * 1024 + 5);
    let contents: [&[u8]; 4] = [b"small", &large, b"", &[0; 5_000_000]];
    let (packs, files) = packed(&contents);
    let chunks: Vec<Digest> = packs
        .iter()
        .flat_map(|pack| Pack::parse(pack.clone()).unwrap().index().to_vec())
        .map(|indexed| indexed.chunk.hash)
        .collect();
    assert!(sender.have(&chunks).await.unwrap().iter().all(|&bits| bits == 0));
    let acks = sender.put(packs.clone()).await.unwrap();
    let expected: Vec<_> = packs.iter().map(|pack| pack.slice(pack.len() - 32..)).collect();
    assert_eq!(acks.iter().map(|ack| ack.pack_hash.clone()).collect::<Vec<_>>(), expected);
    assert!(acks.iter().all(|ack| !ack.duplicate));
    assert!(sender.put(packs.clone()).await.unwrap().iter().all(|ack| ack.duplicate));
    let bits: u32 = sender.have(&chunks).await.unwrap().iter().map(|bits| bits.count_ones()).sum();
    assert_eq!(bits as usize, chunks.len());

    let mut ops = vec![create("d", v1::entry::Kind::Dir(v1::DirEntry {}))];
    let names = ["d/small", "large", "empty", "zeros"];
    for (name, file) in names.iter().zip(&files) {
        ops.push(create(name, v1::entry::Kind::File(file.clone())));
    }
    let result = sender.commit(ops).await.unwrap();
    assert_eq!((result.rejected.len(), result.seqs.len(), result.seq), (0, 5, 5));

    let head = receiver.head().await.unwrap();
    assert_eq!((head.seq, &head.root_digest), (5, &result.root_digest));
    assert_eq!((head.name.as_str(), head.applied_seq), ("code", 0));
    let pages = receiver.changes(0).await.unwrap();
    let changes: Vec<_> = pages.into_iter().flat_map(|page| page.changes).collect();
    assert_eq!(changes.len(), 5);
    let received = receiver.get(&chunks).await.unwrap();
    let mut content = HashMap::new();
    for pack in received {
        assert!(packs.contains(&pack.pack), "the same bytes");
        let pack = Pack::parse(pack.pack).unwrap();
        pack.for_each_chunk(|chunk, data| drop(content.insert(chunk.hash, data.to_vec()))).unwrap();
    }
    for change in changes {
        let Some(v1::entry::Kind::File(wire)) = change.entry.clone().unwrap().kind else {
            continue;
        };
        let op = v1::Op { path: change.path.clone(), new: change.entry, ..Default::default() };
        let op = convert::commit(
            v1::CommitRequest {
                commit_id: CommitId::new().as_bytes().to_vec().into(),
                epoch: head.epoch.clone(),
                ops: vec![op],
                ..Default::default()
            },
            receiver.node,
        );
        let Some(Ok(op)) = op.unwrap().ops.pop() else { panic!("a valid entry comes back") };
        let Some(Entry::File(file)) = op.new else { panic!("a file") };
        let whole: Vec<u8> = file.chunks().flat_map(|chunk| content[&chunk.hash].clone()).collect();
        let at = names.iter().position(|name| name.as_bytes() == change.path).unwrap();
        assert!(whole == contents[at], "{}", names[at]);
        assert_eq!(wire, files[at]);
    }
    let waiting = fixture.registry.changes();
    receiver.ack(5).await.unwrap();
    assert!(waiting.has_changed().unwrap(), "who waits for this member looks again");
    assert_eq!(receiver.head().await.unwrap().applied_seq, 5);
    assert_eq!(sender.head().await.unwrap().applied_seq, 0);
    assert_eq!(code(&receiver.ack(6).await.unwrap_err()), "beyond_head");
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t25_an_incompressible_pack_of_the_largest_size_passes_both_ways() {
    let fixture = Fixture::new().await;
    let mut member = fixture.member();
    let data = noise(2, MAX_RAW_BYTES);
    let chunk = ChunkRef::of(&data).unwrap();
    let mut builder = PackBuilder::new(1).unwrap();
    assert_eq!(builder.push(chunk, &data), Pushed::Added);
    let (_, pack) = builder.finish().unwrap();
    assert!(pack.len() > cortex_proto::MAX_PACK_BYTES);
    member.put(vec![pack.clone()]).await.unwrap();
    assert_eq!(member.get(&[chunk.hash]).await.unwrap()[0].pack, pack);
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_read_the_library_and_do_not_write_to_it() {
    let fixture = Fixture { id: WorkspaceId::LIBRARY, ..Fixture::new().await };
    let mut node = fixture.member();
    let put = node.put(vec![packed(&[b"x"]).0.remove(0)]).await.unwrap_err();
    let ops = vec![create("planted", v1::entry::Kind::Dir(v1::DirEntry {}))];
    let commit = node.commit(ops).await.unwrap_err();
    for refusal in [put, commit] {
        assert_eq!((refusal.code(), code(&refusal)), (Code::PermissionDenied, "library_read_only"));
    }
    assert_eq!(node.head().await.unwrap().seq, 0);
    assert!(node.changes(0).await.unwrap().iter().all(|page| page.changes.is_empty()));
    node.ack(0).await.unwrap();
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_no_member_gets_nothing_from_any_method() {
    let fixture = Fixture::new().await;
    fixture
        .member()
        .commit(vec![create("d", v1::entry::Kind::Dir(v1::DirEntry {}))])
        .await
        .unwrap();
    let mut stranger = fixture.stranger();
    let epoch = Bytes::from_static(&[0; 16]);
    let (workspace_id, commit_id) = (stranger.workspace_id(), epoch.clone());
    let commit = v1::CommitRequest {
        rules: None,
        workspace_id: workspace_id.clone(),
        commit_id,
        epoch: epoch.clone(),
        ops: vec![],
        known: None,
    };
    let ack = v1::AckAppliedRequest { workspace_id, epoch, seq: 0 };
    let refusals = [
        stranger.head().await.unwrap_err(),
        stranger.have(&[]).await.unwrap_err(),
        stranger.put(vec![packed(&[b"x"]).0.remove(0)]).await.unwrap_err(),
        stranger.client.commit(commit).await.unwrap_err(),
        stranger.changes(0).await.unwrap_err(),
        stranger.get(&[]).await.unwrap_err(),
        stranger.client.ack_applied(ack).await.unwrap_err(),
    ];
    for refusal in refusals {
        assert_eq!((refusal.code(), code(&refusal)), (Code::PermissionDenied, "not_a_member"));
    }
    // Without a certificate there is no caller at all.
    let request = v1::HeadRequest { workspace_id: stranger.workspace_id(), known: None };
    let refusal = SyncClient::new(fixture.channel()).head(request).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unauthenticated);
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_away_for_longer_than_deletions_are_recorded_gets_the_whole_tree() {
    let fixture = Fixture::new().await;
    let mut member = fixture.member();
    let dir = || v1::entry::Kind::Dir(v1::DirEntry {});
    member.commit(vec![create("stays", dir()), create("goes", dir())]).await.unwrap();
    let expected = convert::wire_digest(&Entry::Dir.identity());
    let path = Bytes::from_static(b"goes");
    let delete = v1::Op { path, expected, new: None, conflict_of: Bytes::new() };
    member.commit(vec![delete]).await.unwrap();
    let paths = |pages: &[v1::ChangesPage]| -> Vec<Bytes> {
        pages.iter().flat_map(|page| &page.changes).map(|change| change.path.clone()).collect()
    };
    let pages = member.changes(2).await.unwrap();
    assert_eq!((paths(&pages), pages[0].complete), (vec![Bytes::from("goes")], false));

    let in_40_days = cortex_shared::clock::unix_ms() + 40 * 24 * 3600 * 1000;
    let workspace = fixture.workspaces.workspace(fixture.id).await.unwrap();
    workspace.collect(in_40_days, 0).await.unwrap();
    let pages = member.changes(2).await.unwrap();
    assert_eq!((paths(&pages), pages[0].complete), (vec![Bytes::from("stays")], true));
    for after in [0, 3] {
        let pages = member.changes(after).await.unwrap();
        assert!(pages.iter().all(|page| !page.complete), "{after}");
    }
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conflict_copy_that_is_there_already_is_no_news_nor_is_one_of_too_many() {
    let fixture = Fixture::new().await;
    let mut member = fixture.member();
    let mut known = crate::store::fixtures::node("box");
    known.id = member.node;
    fixture.registry.add(known);
    let dir = || v1::entry::Kind::Dir(v1::DirEntry {});
    let copy = |path: &str| v1::Op { conflict_of: "kept".into(), ..create(path, dir()) };
    let published = || fixture.events.counters().published;
    // The second commit makes one of its two copies only.
    for (ops, told) in [
        (vec![create("kept", dir()), copy("a")], 1),
        (vec![copy("a"), copy("b")], 2),
        (vec![copy("b"), copy("a")], 2),
    ] {
        assert!(member.commit(ops).await.unwrap().rejected.is_empty());
        assert_eq!(published(), told);
    }
    while fixture.registry.may_tell(member.node, Instant::now()) {}
    member.commit(vec![copy("c")]).await.unwrap();
    assert_eq!(published(), 2);
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ended_membership_ends_a_stream() {
    let fixture = Fixture::new().await;
    let mut member = fixture.member();
    let (sender, packs) = tokio::sync::mpsc::channel(1);
    let put = |content: &[u8]| v1::PutPack {
        workspace_id: fixture.id.as_bytes().to_vec().into(),
        pack: packed(&[content]).0.remove(0),
    };
    sender.send(put(b"one")).await.unwrap();
    let packs = tokio_stream::wrappers::ReceiverStream::new(packs);
    let mut acks = member.client.put_packs(packs).await.unwrap().into_inner();
    assert!(acks.message().await.unwrap().is_some());
    fixture.members.0.lock().unwrap().clear();
    sender.send(put(b"two")).await.unwrap();
    assert_eq!(acks.message().await.unwrap_err().code(), Code::PermissionDenied);
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_have_stable_codes_and_hurt_nobody_else() {
    let fixture = Fixture::new().await;
    let mut member = fixture.member();
    let (good, _) = packed(&[b"good"]);
    let mut bad = good[0].to_vec();
    bad[20] ^= 1;
    let refusal = member.put(vec![good[0].clone(), bad.into()]).await.unwrap_err();
    assert_eq!((refusal.code(), code(&refusal)), (Code::InvalidArgument, "invalid_argument"));
    // The pack before it was taken or not, and can be sent again.
    assert_eq!(member.put(good).await.unwrap().len(), 1);

    let answers = member.get(&[Digest::of(b"unknown"), Digest::of(b"good")]).await.unwrap();
    assert_eq!(answers[0].missing, Digest::of(b"unknown").as_bytes()[..], "named");
    assert!(answers[0].pack.is_empty() && answers.len() == 2);
    assert!(!answers[1].pack.is_empty(), "and the others are sent");
    assert_eq!(code(&member.changes(1).await.unwrap_err()), "beyond_head");
    assert_eq!(member.have(&[Digest::ZERO; 8193]).await.unwrap_err().code(), Code::InvalidArgument);

    let dir = || create("d", v1::entry::Kind::Dir(v1::DirEntry {}));
    let missing = v1::FileEntry {
        content: convert::wire_digest(&Digest::of(b"unknown")),
        size: 7,
        ..Default::default()
    };
    let result = member
        .commit(vec![
            dir(),
            create("../escape", v1::entry::Kind::Dir(v1::DirEntry {})),
            create("f", v1::entry::Kind::File(missing)),
            create("none/x", v1::entry::Kind::Dir(v1::DirEntry {})),
        ])
        .await
        .unwrap();
    let reasons: Vec<_> = result.rejected.iter().map(|r| (r.index, r.reason())).collect();
    use v1::RejectReason::{Invalid, MissingChunks, NoParent};
    assert_eq!(reasons, [(1, Invalid), (2, MissingChunks), (3, NoParent)]);
    assert_eq!(result.rejected[1].missing, Digest::of(b"unknown").as_bytes()[..]);

    let epoch = member.head().await.unwrap().epoch;
    let mut request = v1::CommitRequest {
        rules: None,
        workspace_id: member.workspace_id(),
        commit_id: CommitId::new().as_bytes().to_vec().into(),
        epoch: Bytes::from_static(&[7; 16]),
        ops: vec![create("e", v1::entry::Kind::Dir(v1::DirEntry {}))],
        known: None,
    };
    let refusal = member.client.commit(request.clone()).await.unwrap_err();
    assert_eq!(code(&refusal), "epoch_changed");
    request.epoch = epoch;
    let first = member.client.commit(request.clone()).await.unwrap().into_inner();
    assert_eq!(member.client.commit(request.clone()).await.unwrap().into_inner(), first);
    let mut other = fixture.member();
    assert_eq!(code(&other.client.commit(request).await.unwrap_err()), "commit_id_used");
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_does_not_read_holds_up_itself_only() {
    let fixture = Fixture::new().await;
    let (mut idle, mut busy) = (fixture.member(), fixture.member());
    let contents: Vec<Vec<u8>> = (0..6).map(|seed| noise(seed, MAX_RAW_BYTES)).collect();
    let chunks: Vec<_> = contents.iter().map(|data| ChunkRef::of(data).unwrap()).collect();
    let mut builder = PackBuilder::new(1).unwrap();
    let mut packs = Vec::new();
    for (chunk, data) in chunks.iter().zip(&contents) {
        builder.push(*chunk, data);
        packs.extend(builder.finish().map(|(_, pack)| pack));
    }
    busy.put(packs).await.unwrap();
    let hashes: Vec<Digest> = chunks.iter().map(|chunk| chunk.hash).collect();
    // Each stream takes as much room as it may have under way; a member has room for three.
    let request =
        v1::GetPacksRequest { workspace_id: idle.workspace_id(), chunks: concatenated(&hashes) };
    let mut unread = Vec::new();
    for _ in 0..3 {
        unread.push(idle.client.get_packs(request.clone()).await.unwrap().into_inner());
    }
    let mut fourth = Box::pin(idle.client.get_packs(request));
    // Polled, so that it is under way; it waits for its own member's room.
    let mut context = Context::from_waker(Waker::noop());
    assert!(fourth.as_mut().poll(&mut context).is_pending());
    assert_eq!(busy.get(&hashes).await.unwrap().len(), 6);
    assert!(fourth.as_mut().poll(&mut context).is_pending());
    drop(unread);
    assert_eq!(fourth.await.unwrap().into_inner().try_collect::<Vec<_>>().await.unwrap().len(), 6);
    fixture.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_ends_silent_streams_with_a_status() {
    let fixture = Fixture::new().await;
    let mut member = fixture.member();
    member.head().await.unwrap();
    let silent = stream::pending::<v1::PutPack>();
    let mut acks = member.client.put_packs(silent).await.unwrap().into_inner();
    fixture.scope.cancel();
    let refusal = acks.message().await.unwrap_err();
    assert_eq!((refusal.code(), code(&refusal)), (Code::Unavailable, "shutting_down"));
    drop(acks);
    fixture.close().await;
}
