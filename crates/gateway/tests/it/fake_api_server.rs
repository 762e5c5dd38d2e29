//! API server of Kubernetes, scripted by the test: lists pods and pools, and sends changes of pods to
//! those who watch them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::poll_fn;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

/// Namespace of the pods.
pub(crate) const NAMESPACE: &str = "prod";

type Body = BoxBody<Bytes, Infallible>;

/// Makes names of files unique.
static FILES: AtomicUsize = AtomicUsize::new(0);

/// A pod, ready and with the label `app=vllm` unless it is changed.
#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) ip: String,
    pub(crate) phase: &'static str,
    pub(crate) ready: bool,
    pub(crate) deleting: bool,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Pod {
    /// Returns a pod whose engine listens at `address`.
    pub(crate) fn at(name: &str, address: SocketAddr) -> Self {
        let port = address.port().to_string();
        Self {
            name: name.to_owned(),
            uid: format!("uid-of-{name}"),
            ip: address.ip().to_string(),
            phase: "Running",
            ready: true,
            deleting: false,
            labels: BTreeMap::from([("app".to_owned(), "vllm".to_owned())]),
            annotations: BTreeMap::from([("foresee.dev/port".to_owned(), port)]),
        }
    }

    pub(crate) fn annotated(mut self, annotation: &str, value: &str) -> Self {
        self.annotations
            .insert(annotation.to_owned(), value.to_owned());
        self
    }

    fn json(&self, version: u64) -> Value {
        let mut metadata = json!({
            "name": self.name, "namespace": NAMESPACE, "uid": self.uid,
            "resourceVersion": version.to_string(),
            "creationTimestamp": "2026-11-30T12:00:00Z",
            "labels": self.labels, "annotations": self.annotations,
            "managedFields": [{ "manager": "kubelet", "operation": "Update",
                "fieldsV1": { "f:status": { "f:conditions": {} } } }],
        });
        if self.deleting {
            metadata["deletionTimestamp"] = "2026-11-30T12:34:56Z".into();
            metadata["deletionGracePeriodSeconds"] = 30.into();
        }
        let mut status = json!({
            "phase": self.phase,
            "conditions": [
                { "type": "PodScheduled", "status": "True" },
                { "type": "Ready", "status": if self.ready { "True" } else { "False" } },
            ],
        });
        if !self.ip.is_empty() {
            status["podIP"] = self.ip.clone().into();
            status["podIPs"] = json!([{ "ip": self.ip }]);
        }
        let spec = json!({ "containers": [{ "name": "vllm", "image": "vllm/vllm-openai" }] });
        json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec,
            "status": status })
    }

    fn matches(&self, selector: &str) -> bool {
        let mut terms = selector.split(',').filter(|term| !term.is_empty());
        terms.all(|term| {
            let (key, value) = term.split_once('=').expect("a selector of equality");
            self.labels.get(key).is_some_and(|label| label == value)
        })
    }
}

struct Watch {
    selector: String,
    events: mpsc::UnboundedSender<Bytes>,
}

#[derive(Default)]
struct State {
    version: u64,
    pods: BTreeMap<String, Pod>,
    /// Descriptions of pools, by path.
    pools: BTreeMap<String, Value>,
    /// Events that were sent, with their version and the pod before and after them.
    log: Vec<(u64, Option<Pod>, Option<Pod>)>,
    watches: Vec<Watch>,
    /// Whether no change is sent to those who watch.
    is_silent: bool,
    /// Whether requests for lists get no response.
    hangs: bool,
    /// Whether the next watch is refused because its version is too old.
    expires_next: bool,
    /// Delay of every response.
    delay: Duration,
    /// Token without which requests get a 401.
    token: Option<String>,
    /// Status and message of all responses.
    refusal: Option<(u16, String)>,
    /// Paths and queries of the requests.
    requests: Vec<String>,
}

/// A scripted API server, with the kubeconfig that leads to it.
pub(crate) struct ApiServer {
    pub(crate) kubeconfig: PathBuf,
    /// File with the token of the kubeconfig.
    pub(crate) token_file: PathBuf,
    state: Arc<Mutex<State>>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.kubeconfig.parent().unwrap());
    }
}

impl ApiServer {
    pub(crate) async fn start() -> Self {
        Self::start_with(false).await
    }

    /// Starts a server with a certificate that an authority of its own has signed.
    pub(crate) async fn start_tls() -> Self {
        Self::start_with(true).await
    }

    async fn start_with(has_tls: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let number = FILES.fetch_add(1, Ordering::SeqCst);
        let folder = format!("foresee-api-server-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        let (kubeconfig, token_file) = (folder.join("config"), folder.join("token"));
        std::fs::write(&token_file, "first").unwrap();
        let state = Arc::new(Mutex::new(State {
            version: 100,
            ..State::default()
        }));
        let (scheme, tls) = if has_tls {
            let (acceptor, ca) = acceptor();
            std::fs::write(folder.join("ca.crt"), ca).unwrap();
            ("https", Some(acceptor))
        } else {
            ("http", None)
        };
        let mut cluster = format!("server: {scheme}://{address}");
        if has_tls {
            let ca = folder.join("ca.crt");
            cluster += &format!(", certificate-authority: {}", ca.display());
        }
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{{cluster}}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u, namespace: {NAMESPACE}}}}}]\n\
             users: [{{name: u, user: {{tokenFile: {}}}}}]\n",
            token_file.display()
        );
        std::fs::write(&kubeconfig, text).unwrap();
        let served = Arc::clone(&state);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (state, tls) = (Arc::clone(&served), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(state, stream).await;
                            }
                        }
                        None => serve(state, stream).await,
                    }
                });
            }
        });
        Self {
            kubeconfig,
            token_file,
            state,
        }
    }

    /// Adds or changes a pod.
    pub(crate) fn apply(&self, pod: Pod) {
        self.change(pod.name.clone(), Some(pod), true);
    }

    /// Adds pods that no watch shows.
    pub(crate) fn apply_silently(&self, pod: Pod) {
        self.change(pod.name.clone(), Some(pod), false);
    }

    /// Deletes a pod, at once.
    pub(crate) fn delete(&self, name: &str) {
        self.change(name.to_owned(), None, true);
    }

    /// Deletes a pod, which only a list shows.
    pub(crate) fn remove_silently(&self, name: &str) {
        self.change(name.to_owned(), None, false);
    }

    /// Marks a pod as being deleted.
    pub(crate) fn terminate(&self, name: &str) {
        let mut pod = self.state.lock().pods[name].clone();
        pod.deleting = true;
        self.apply(pod);
    }

    fn change(&self, name: String, new: Option<Pod>, is_sent: bool) {
        let mut state = self.state.lock();
        state.version += 1;
        let version = state.version;
        let old = match &new {
            Some(pod) => state.pods.insert(name, pod.clone()),
            None => state.pods.remove(&name),
        };
        if is_sent && !state.is_silent {
            state.watches.retain(|watch| {
                event(&watch.selector, version, old.as_ref(), new.as_ref())
                    .is_none_or(|line| watch.events.send(line).is_ok())
            });
        }
        if is_sent {
            state.log.push((version, old, new));
        }
    }

    /// Adds or changes a pool, given by its selector and ports.
    pub(crate) fn set_pool(&self, name: &str, label: (&str, &str), ports: &[u16]) {
        let api = "inference.networking.k8s.io/v1";
        let path = format!("/apis/{api}/namespaces/{NAMESPACE}/inferencepools/{name}");
        let ports: Vec<Value> = ports.iter().map(|port| json!({ "number": port })).collect();
        let pool = json!({
            "apiVersion": api, "kind": "InferencePool",
            "metadata": { "name": name, "namespace": NAMESPACE },
            "spec": { "selector": { "matchLabels": { label.0: label.1 } }, "targetPorts": ports,
                "endpointPickerRef": { "name": "foresee", "port": { "number": 9002 } } },
        });
        self.state.lock().pools.insert(path, pool);
    }

    /// Closes all watches.
    pub(crate) fn sever(&self) {
        self.state.lock().watches.clear();
    }

    /// Ends all watches with the error that their version is too old.
    pub(crate) fn expire(&self) {
        let mut state = self.state.lock();
        let status = json!({ "type": "ERROR", "object": gone() });
        for watch in state.watches.drain(..) {
            let _ = watch.events.send(line(&status));
        }
        state.log.clear();
    }

    /// Refuses the next watch because its version is too old.
    pub(crate) fn expire_next(&self) {
        self.state.lock().expires_next = true;
    }

    /// Sets whether watches stay open and show no changes.
    pub(crate) fn set_silent(&self, is_silent: bool) {
        self.state.lock().is_silent = is_silent;
    }

    /// Sets whether lists get no response.
    pub(crate) fn set_hanging(&self, hangs: bool) {
        self.state.lock().hangs = hangs;
    }

    /// Sets the delay of every response.
    pub(crate) fn set_delay(&self, delay: Duration) {
        self.state.lock().delay = delay;
    }

    /// Accepts this token alone.
    pub(crate) fn require_token(&self, token: &str) {
        self.state.lock().token = Some(token.to_owned());
    }

    /// Refuses all requests with this status, or none.
    pub(crate) fn refuse(&self, refusal: Option<(u16, &str)>) {
        self.state.lock().refusal = refusal.map(|(code, text)| (code, text.to_owned()));
    }

    /// Returns the number of open watches.
    pub(crate) fn watches(&self) -> usize {
        let mut state = self.state.lock();
        state.watches.retain(|watch| !watch.events.is_closed());
        state.watches.len()
    }

    /// Returns the number of requests for lists.
    pub(crate) fn lists(&self) -> usize {
        let state = self.state.lock();
        let requests = state.requests.iter();
        let is_list = |path: &&String| path.contains("/pods?") && !path.contains("watch=true");
        requests.filter(is_list).count()
    }
}

/// Returns a certificate for 127.0.0.1 and that of its authority.
fn acceptor() -> (TlsAcceptor, String) {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let certificate = server.signed_by(&key, &issuer).unwrap();
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();
    (TlsAcceptor::from(Arc::new(config)), ca_certificate.pem())
}

/// Returns the line that a watch gets for a change of a pod; `None` if its selector never matched.
fn event(selector: &str, version: u64, old: Option<&Pod>, new: Option<&Pod>) -> Option<Bytes> {
    let old = old.filter(|pod| pod.matches(selector));
    let (kind, pod) = match (old, new.filter(|pod| pod.matches(selector)), new) {
        (None, Some(new), _) => ("ADDED", new),
        (Some(_), Some(new), _) => ("MODIFIED", new),
        // A pod that lost its label is shown as it is now.
        (Some(_), None, Some(relabelled)) => ("DELETED", relabelled),
        (Some(old), None, None) => ("DELETED", old),
        (None, None, _) => return None,
    };
    Some(line(&json!({ "type": kind, "object": pod.json(version) })))
}

fn line(event: &Value) -> Bytes {
    format!("{event}\n").into()
}

fn gone() -> Value {
    failure(
        410,
        "The resourceVersion for the provided watch is too old.",
    )
}

fn failure(code: u16, message: &str) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": "Failed", "code": code })
}

/// Serves one connection.
async fn serve(state: Arc<Mutex<State>>, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(move |request| respond(Arc::clone(&state), request));
    let connection = hyper::server::conn::http1::Builder::new();
    let _ = connection
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn respond(
    state: Arc<Mutex<State>>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let uri = request.uri().clone();
    let authorization = request.headers().get("authorization").cloned();
    let (delay, hangs) = {
        let mut state = state.lock();
        state.requests.push(uri.to_string());
        (state.delay, state.hangs)
    };
    tokio::time::sleep(delay).await;
    let query: BTreeMap<String, String> =
        uri.query()
            .unwrap_or("")
            .split('&')
            .fold(BTreeMap::new(), |mut query, pair| {
                let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                let value = percent_encoding::percent_decode_str(value);
                query.insert(key.to_owned(), value.decode_utf8().unwrap().into_owned());
                query
            });
    let is_watch = query
        .get("watch")
        .is_some_and(|value| value == "true" || value == "1");
    if hangs && !is_watch {
        std::future::pending::<()>().await;
    }
    let mut state = state.lock();
    if let Some((code, message)) = &state.refusal {
        return Ok(reply(*code, &failure(*code, message)));
    }
    let bearer = state.token.as_ref().map(|token| format!("Bearer {token}"));
    let given = authorization.as_ref().and_then(|value| value.to_str().ok());
    if bearer.is_some() && bearer.as_deref() != given {
        return Ok(reply(401, &failure(401, "Unauthorized")));
    }
    if let Some(pool) = state.pools.get(uri.path()) {
        return Ok(reply(200, pool));
    }
    if let Some(body) = api_description(uri.path()) {
        return Ok(reply(200, &body));
    }
    let in_namespace = format!("/api/v1/namespaces/{NAMESPACE}/pods");
    if uri.path() != in_namespace && uri.path() != "/api/v1/pods" {
        return Ok(reply(
            404,
            &failure(404, "the server could not find the requested resource"),
        ));
    }
    let selector = query.get("labelSelector").cloned().unwrap_or_default();
    if !is_watch {
        return Ok(reply(200, &list(&state, &selector, &query)));
    }
    if std::mem::take(&mut state.expires_next) {
        return Ok(reply(410, &gone()));
    }
    let since: u64 = query
        .get("resourceVersion")
        .map_or(0, |text| text.parse().unwrap());
    let (events, mut received) = mpsc::unbounded_channel();
    if !state.is_silent {
        for (version, old, new) in state.log.iter().filter(|(version, ..)| *version > since) {
            if let Some(line) = event(&selector, *version, old.as_ref(), new.as_ref()) {
                events.send(line).unwrap();
            }
        }
    }
    if query
        .get("allowWatchBookmarks")
        .is_some_and(|value| value == "true")
    {
        let bookmark = json!({ "type": "BOOKMARK", "object": { "kind": "Pod", "apiVersion": "v1",
            "metadata": { "resourceVersion": state.version.to_string() } } });
        events.send(line(&bookmark)).unwrap();
    }
    state.watches.push(Watch { selector, events });
    let frames = poll_fn(move |context| {
        let received = received.poll_recv(context);
        received.map(|line| line.map(|line| Ok(Frame::data(line))))
    });
    let response = Response::builder().header("content-type", "application/json");
    Ok(response
        .body(BoxBody::new(StreamBody::new(frames)))
        .unwrap())
}

/// Returns what the server says of its API, which `kubectl` asks for.
fn api_description(path: &str) -> Option<Value> {
    match path {
        "/api" => Some(json!({ "kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [] })),
        "/apis" => Some(json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [] })),
        "/api/v1" => Some(
            json!({ "kind": "APIResourceList", "groupVersion": "v1", "resources": [{
            "name": "pods", "singularName": "pod", "namespaced": true, "kind": "Pod",
            "verbs": ["get", "list", "watch"] }] }),
        ),
        _ => None,
    }
}

/// Returns one page of a list.
fn list(state: &State, selector: &str, query: &BTreeMap<String, String>) -> Value {
    let limit = query
        .get("limit")
        .map_or(usize::MAX, |text| text.parse().unwrap());
    let start: usize = query
        .get("continue")
        .map_or(0, |text| text.parse().unwrap());
    let matching = state.pods.values().filter(|pod| pod.matches(selector));
    let matching: Vec<&Pod> = matching.collect();
    let end = matching.len().min(start.saturating_add(limit));
    let items: Vec<Value> = matching[start..end]
        .iter()
        .map(|pod| pod.json(state.version))
        .collect();
    let mut metadata = json!({ "resourceVersion": state.version.to_string() });
    if end < matching.len() {
        metadata["continue"] = end.to_string().into();
    }
    json!({ "kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items })
}

fn reply(status: u16, body: &Value) -> Response<Body> {
    let response = Response::builder()
        .status(StatusCode::from_u16(status).unwrap())
        .header("content-type", "application/json");
    let body = Full::new(Bytes::from(body.to_string()));
    response.body(body.boxed()).unwrap()
}
