//! The API through a real listener, on the embedded backends.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode};
use serde_json::{Value, json};

use super::*;
use crate::cache::memory::MemoryCache;
use crate::clock::Clock;
use crate::queue::embedded::EmbeddedQueue;
use crate::service::{Directory, Presence};
use crate::shortage::Resource;
use crate::store::sqlite::SqliteStore;
use crate::store::{Bid, Endpoint, Store};
use crate::telemetry::Metrics;

struct Api {
    port: u16,
    stop: CancellationToken,
    store: Arc<dyn Store>,
    metrics: Arc<Metrics>,
}

impl Api {
    async fn start() -> Api {
        Api::guarded(false, &[]).await
    }

    /// An API that asks for keys when `keyed`, and goes by these names too.
    async fn guarded(keyed: bool, hosts: &[&str]) -> Api {
        Api::serving(keyed, hosts, CONNECTIONS).await
    }

    /// One that takes so many connections at once.
    async fn serving(keyed: bool, hosts: &[&str], connections: usize) -> Api {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().unwrap());
        store.put_endpoint(&Endpoint::new("default", "http://localhost:3000")).await.unwrap();
        let clock = Clock::system();
        let directory = Arc::new(Directory::new(Arc::clone(&store)));
        let context = Context {
            presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "api", "test")),
            queue: Arc::new(EmbeddedQueue::new(2, clock.clone())),
            cache: Arc::new(MemoryCache::new(&clock)),
            metrics: Arc::default(),
            clock: clock.clone(),
            directory,
            store: Arc::clone(&store),
        };
        context.presence.renew().await.unwrap();
        let (instance, now) = (context.presence.instance().unwrap(), clock.now());
        let until = now.after(Duration::from_secs(60));
        let bid = Bid { instance, now, until, paced_until: None, pacing: None };
        assert!(store.lead(&bid).await.unwrap().is_some(), "a producer is there");
        let intake =
            Intake::new(Arc::clone(&store), clock.clone(), Arc::clone(&context.metrics), Arc::default());
        let hosts = hosts.iter().map(|name| (*name).to_owned()).collect();
        let access = Access { keyed, reached: keyed, hosts };
        let guard = Guard::new(Arc::clone(&store), clock, access);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = CancellationToken::new();
        let router = router(ApiState::new(&context, intake, guard, true));
        let metrics = Arc::clone(&context.metrics);
        tokio::spawn(serve(listener, router, context, connections, stop.clone()));
        Api { port, stop, store, metrics }
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> (StatusCode, String, String) {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", "localhost");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response =
            sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap()).await.unwrap();
        let content_type =
            response.headers().get("content-type").map(|value| value.to_str().unwrap().to_owned());
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, content_type.unwrap_or_default(), String::from_utf8(body.to_vec()).unwrap())
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let headers = [("content-type", "application/json")];
        let (status, _, body) = self.call(Method::POST, path, &headers, body.to_string()).await;
        (status, serde_json::from_str(&body).unwrap())
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        let (status, _, body) = self.call(Method::GET, path, &[], String::new()).await;
        (status, serde_json::from_str(&body).unwrap())
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test]
async fn a_message_is_accepted_and_shown_with_what_it_waits_for() {
    let api = Api::start().await;
    let (status, sent) =
        api.post("/v1/messages", json!({"recipient": "+90", "content": "Hello", "tags": {"a": 1}})).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!(
        (&sent["id"], &sent["status"], &sent["endpoint"]),
        (&json!(1), &json!("pending"), &json!("default"))
    );
    let (status, shown) = api.get("/v1/messages/1").await;
    assert_eq!((status, &shown), (StatusCode::OK, &sent));
    assert!(shown["why"].as_str().unwrap().contains("due now"));
    assert_eq!(
        api.get("/v1/messages/1/attempts").await,
        (StatusCode::OK, json!({"data": [], "next_cursor": null}))
    );
    assert_eq!(api.get("/v1/messages/1/response").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_batch_is_stored_whole_or_not_at_all() {
    let api = Api::start().await;
    let good = json!({"recipient": "+90", "content": "Hello"});
    let (status, ids) = api.post("/v1/messages/batch", json!({"messages": [good, good]})).await;
    assert_eq!((status, ids), (StatusCode::ACCEPTED, json!({"ids": [1, 2], "existing": 0})));
    let bad = json!({"recipient": "", "content": "Hello", "endpoint": "nobody"});
    let (status, problem) = api.post("/v1/messages/batch", json!({"messages": [good, bad]})).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let fields: Vec<_> =
        problem["errors"].as_array().unwrap().iter().map(|e| (&e["index"], &e["field"])).collect();
    assert_eq!(fields, [(&json!(1), &json!("recipient")), (&json!(1), &json!("endpoint"))]);
    assert_eq!(api.get("/v1/messages/3").await.0, StatusCode::NOT_FOUND);
    let keyed = |key: &str| json!({"recipient": "+90", "content": "Hello", "idempotency_key": key});
    for (keys, ids, existing) in [(["a", "b"], [3, 4], 0), (["b", "c"], [4, 5], 1), (["c", "c"], [5, 5], 2)] {
        let batch = json!({"messages": keys.map(keyed)});
        let answer = api.post("/v1/messages/batch", batch).await;
        assert_eq!(answer, (StatusCode::ACCEPTED, json!({"ids": ids, "existing": existing})));
    }
    let keyed = |content: &str| json!({"recipient": "+90", "content": content, "idempotency_key": "once"});
    let conflict = json!({"messages": [good, keyed("Hello"), good, keyed("Other")]});
    let (status, problem) = api.post("/v1/messages/batch", conflict).await;
    assert_eq!((status, &problem["errors"][0]["index"]), (StatusCode::UNPROCESSABLE_ENTITY, &json!(3)));
    assert_eq!(problem["errors"][0]["field"], "idempotency_key");
    let (status, problem) = api.post("/v1/messages/batch", json!({"messages": [keyed("Hello")]})).await;
    assert_eq!((status, &problem["ids"]), (StatusCode::ACCEPTED, &json!([6])));
    let (status, problem) = api.post("/v1/messages/batch", json!({"messages": [keyed("Other")]})).await;
    assert_eq!(
        (status, &problem["errors"][0]["index"]),
        (StatusCode::UNPROCESSABLE_ENTITY, &json!(0)),
        "{problem}"
    );
    assert_eq!(api.get("/v1/messages/7").await.0, StatusCode::NOT_FOUND);
    assert_eq!(
        api.post("/v1/messages/batch", json!({"messages": []})).await.0,
        StatusCode::UNPROCESSABLE_ENTITY
    );
}

#[tokio::test]
async fn an_idempotency_key_makes_one_message() {
    let api = Api::start().await;
    let headers = [("content-type", "application/json"), ("idempotency-key", "once")];
    let body = |content: &str| json!({"recipient": "+90", "content": content}).to_string();
    let first = api.call(Method::POST, "/v1/messages", &headers, body("Hello")).await;
    let again = api.call(Method::POST, "/v1/messages", &headers, body("Hello")).await;
    let other = api.call(Method::POST, "/v1/messages", &headers, body("Other")).await;
    assert_eq!(
        (first.0, again.0, other.0),
        (StatusCode::ACCEPTED, StatusCode::OK, StatusCode::UNPROCESSABLE_ENTITY)
    );
    assert_eq!(first.2, again.2);
    assert!(other.2.contains("idempotency_conflict"), "{}", other.2);
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_a_problem_with_a_code() {
    let api = Api::start().await;
    let json_type = [("content-type", "application/json")];
    for (method, path, headers, body, status, code) in [
        (Method::POST, "/v1/messages", &json_type[..], "{", 400, "invalid_json"),
        (Method::POST, "/v1/messages", &json_type[..], r#"{"recipient":"+90"}"#, 400, "invalid_json"),
        (
            Method::POST,
            "/v1/messages",
            &json_type[..],
            r#"{"recipient":"+90","content":"x","status":"sent"}"#,
            400,
            "invalid_json",
        ),
        (Method::POST, "/v1/messages", &[][..], "{}", 415, "unsupported_media_type"),
        (
            Method::POST,
            "/v1/messages",
            &json_type[..],
            r#"{"recipient":"","content":"x"}"#,
            422,
            "invalid_message",
        ),
        (Method::GET, "/v1/messages/seven", &[][..], "", 400, "invalid_path"),
        (Method::GET, "/v1/messages/7", &[][..], "", 404, "not_found"),
        (Method::GET, "/v2", &[][..], "", 404, "not_found"),
        (Method::DELETE, "/v1/messages/7", &[][..], "", 405, "method_not_allowed"),
    ] {
        let (got, content_type, text) = api.call(method.clone(), path, headers, body.to_owned()).await;
        assert_eq!(got.as_u16(), status, "{method} {path} {body}: {text}");
        assert_eq!(content_type, "application/problem+json", "{method} {path}");
        assert!(text.contains(&format!("\"{code}\"")), "{method} {path}: {text}");
    }
    let large = json!({"recipient": "+90", "content": "x".repeat(3 << 20)}).to_string();
    let (status, _, text) = api.call(Method::POST, "/v1/messages", &json_type, large).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
}

#[tokio::test]
async fn a_head_and_a_depth_have_bounds() {
    let api = Api::start().await;
    let long = "x".repeat(2 * HEAD_MAX);
    let (status, _, _) = api.call(Method::GET, "/livez", &[("x-long", long.as_str())], String::new()).await;
    assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let deep = format!("{}1{}", "{\"a\":".repeat(300), "}".repeat(300));
    let body = format!("{{\"recipient\":\"+90\",\"content\":\"Hello\",\"tags\":{deep}}}");
    let headers = [("content-type", "application/json")];
    let (status, _, text) = api.call(Method::POST, "/v1/messages", &headers, body).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_takes_too_long_is_ended() {
    use tower_service::Service;
    let mut router: Router = Router::new()
        .route("/", get(std::future::pending::<()>))
        .layer(axum::middleware::from_fn(|request, next| in_time(CALL, request, next)));
    let Ok(response) = router.call(Request::new(axum::body::Body::empty())).await;
    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
    assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
}

#[tokio::test]
async fn a_hundred_posts_with_one_key_make_one_message() {
    let api = Api::start().await;
    let headers = [("content-type", "application/json"), ("idempotency-key", "once")];
    let body = json!({"recipient": "+90", "content": "Hello"}).to_string();
    let calls = (0..100).map(|_| api.call(Method::POST, "/v1/messages", &headers, body.clone()));
    let answers = futures_util::future::join_all(calls).await;
    let with = |status| answers.iter().filter(|answer| answer.0 == status).count();
    assert_eq!((with(StatusCode::ACCEPTED), with(StatusCode::OK)), (1, 99));
    assert!(answers.iter().all(|answer| serde_json::from_str::<Value>(&answer.2).unwrap()["id"] == 1));
    assert_eq!(api.get("/v1/messages/2").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn health_status_metrics_and_documents_are_there() {
    let api = Api::start().await;
    assert_eq!(api.call(Method::GET, "/livez", &[], String::new()).await.2, "alive\n");
    let (status, ready) = api.get("/readyz").await;
    assert_eq!(
        (status, &ready["ready"], &ready["parts"]["store"]["kind"]),
        (StatusCode::OK, &json!(true), &json!("sqlite"))
    );
    let (_, whole) = api.get("/v1/status").await;
    assert_eq!(whole["services"][0]["service"], "api");
    assert_eq!(whole["counts"]["pending"], json!({"count": 0, "more": false}));
    let metrics = api.call(Method::GET, "/metrics", &[], String::new()).await.2;
    assert!(metrics.contains("# HELP ams_part_up"), "{metrics}");
    assert!(api.call(Method::GET, "/swagger/index.html", &[], String::new()).await.2.contains("swagger"));
    assert!(api.call(Method::GET, "/", &[], String::new()).await.2.contains("/swagger/index.html"));
    assert_eq!(api.get("/openapi.json").await.1["openapi"], "3.1.0");
}

#[tokio::test]
async fn a_shortage_is_shown_and_the_process_is_ready_all_the_same() {
    let api = Api::start().await;
    let (_, ready) = api.get("/readyz").await;
    assert_eq!(ready["shortages"], json!([]));
    let shortage = Shortage { of: Resource::Ports, why: "no port is left".to_owned() };
    let now = Clock::system().reading();
    api.metrics.put_off(&shortage, now);
    let (status, ready) = api.get("/readyz").await;
    let shown = json!([{"of": "ports", "why": "no port is left", "since": now.time}]);
    assert_eq!((status, &ready["ready"], &ready["shortages"]), (StatusCode::OK, &json!(true), &shown));
    assert_eq!(api.get("/v1/status").await.1["shortages"], shown);
    let metrics = api.call(Method::GET, "/metrics", &[], String::new()).await.2;
    for line in ["ams_put_off_total{of=\"ports\"} 1", "ams_put_off_total{of=\"descriptors\"} 0"] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
}

#[tokio::test]
async fn connections_beyond_the_bound_wait_until_others_end() {
    let api = Api::serving(false, &[], 2).await;
    let mut open = Vec::new();
    for _ in 0..2 {
        // Each is accepted, and says nothing.
        open.push(tokio::net::TcpStream::connect(("127.0.0.1", api.port)).await.unwrap());
    }
    let call = api.call(Method::GET, "/livez", &[], String::new());
    tokio::pin!(call);
    let early = tokio::time::timeout(Duration::from_millis(300), call.as_mut()).await;
    assert!(early.is_err(), "it waits for a place");
    drop(open.pop());
    assert_eq!(call.await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_key_lets_in_as_far_as_its_scopes_go() {
    let api = Api::guarded(true, &[]).await;
    let now = Clock::system().now();
    let hour = Duration::from_secs(3600);
    let key = async |scopes: &[&str], expires_at| {
        let scopes: Vec<_> = scopes.iter().map(|scope| (*scope).to_owned()).collect();
        let (key, whole) = crate::keys::make("test", &scopes, now, expires_at).unwrap();
        api.store.put_key(&key).await.unwrap();
        (key.id, whole)
    };
    let (_, reader) = key(&["read"], Some(now.after(hour))).await;
    let (_, expired) = key(&["read"], Some(now)).await;
    let (revoked_id, revoked) = key(&["read"], None).await;
    assert!(api.store.revoke_key(&revoked_id, now).await.unwrap());
    let forged = format!("{}x", &reader[..reader.len() - 1]);
    let call = async |method: Method, path: &str, key: Option<&str>| {
        let bearer = key.map(|key| format!("Bearer {key}"));
        let mut headers = vec![("content-type", "application/json")];
        headers.extend(bearer.as_ref().map(|bearer| ("authorization", bearer.as_str())));
        let (status, _, text) = api.call(method, path, &headers, "{}".to_owned()).await;
        assert!(!key.is_some_and(|key| text.contains(key)), "{text}");
        status.as_u16()
    };
    assert_eq!(call(Method::GET, "/livez", None).await, 200);
    assert_eq!(call(Method::GET, "/v1/messages", None).await, 401);
    assert_eq!(call(Method::GET, "/v1/messages", Some(&reader)).await, 200);
    for bad in [expired, revoked, forged, "ams_unknown1_x".to_owned()] {
        assert_eq!(call(Method::GET, "/v1/messages", Some(&bad)).await, 401, "{bad}");
    }
    assert_eq!(call(Method::POST, "/v1/messages", Some(&reader)).await, 403);
    assert_eq!(call(Method::POST, "/v1/producer/pause", Some(&reader)).await, 403);
}

#[tokio::test]
async fn a_page_of_another_site_is_refused() {
    let api = Api::guarded(false, &["ams.example.org"]).await;
    for (host, origin, status) in [
        ("localhost:8080", None, 200),
        ("127.0.0.1:8080", None, 200),
        ("[::1]:8080", None, 200),
        ("ams.example.org", None, 200),
        ("evil.example:8080", None, 403),
        ("localhost:8080", Some("http://localhost:8080"), 200),
        ("localhost:8080", Some("http://evil.example"), 403),
        ("localhost:8080", Some("http://localhost:9090"), 403),
        ("localhost:8080", Some("null"), 403),
    ] {
        let mut headers = vec![("host", host)];
        headers.extend(origin.map(|origin| ("origin", origin)));
        for (method, path) in [(Method::GET, "/v1/status"), (Method::GET, "/metrics")] {
            let (got, _, text) = api.call(method, path, &headers, String::new()).await;
            assert_eq!(got.as_u16(), status, "{host} {origin:?} {path}: {text}");
        }
    }
}

/// A name without a dot is whatever the network around says it is.
#[tokio::test]
async fn names_of_the_network_around_are_not_ours() {
    let api = Api::guarded(false, &["api", "10.0.0.5"]).await;
    for (host, status) in [
        ("localhost", 200),
        ("LOCALHOST.:18200", 200),
        ("ams.localhost:8080", 200),
        ("127.0.0.1", 200),
        ("127.8.9.1:18200", 200),
        ("[::1]:18200", 200),
        ("[::ffff:127.0.0.1]", 200),
        ("api:8080", 200),
        ("API.:8080", 200),
        ("10.0.0.5:8080", 200),
        ("evil", 403),
        ("evil:18200", 403),
        ("localhost.evil", 403),
        ("xlocalhost", 403),
        (".localhost", 403),
        ("api.evil.example", 403),
        ("10.0.0.6", 403),
        ("[fd00::1]:8080", 403),
        ("0.0.0.0:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1@evil", 403),
        ("evil:80:127.0.0.1", 403),
        ("", 403),
    ] {
        let origin = format!("http://{host}");
        let headers = [("host", host), ("origin", origin.as_str())];
        let (got, _, text) = api.call(Method::POST, "/v1/producer/pause", &headers, String::new()).await;
        assert_eq!(got.as_u16(), status, "{host}: {text}");
    }
}

#[tokio::test]
async fn a_url_with_a_user_is_refused_without_being_repeated() {
    let api = Api::start().await;
    // A URL that requests can go to is shown as it is.
    let url = "https://example.org/@user/hook?a=b@c";
    api.post("/v1/endpoints", json!({"name": "five", "url": url})).await;
    assert_eq!(api.get("/v1/endpoints/five").await.1["url"], url);
    for url in
        ["http://user:planted@host/", "http://user@host/", "planted:x@host", "http://u:pla/planted@host/"]
    {
        let (status, problem) = api.post("/v1/endpoints", json!({"name": "six", "url": url})).await;
        assert_eq!(
            (status, &problem["errors"][0]["field"]),
            (StatusCode::UNPROCESSABLE_ENTITY, &json!("url"))
        );
        assert!(!problem.to_string().contains("planted"), "{problem}");
        let json_type = [("content-type", "application/json")];
        let body = json!({"url": url}).to_string();
        let (status, _, text) = api.call(Method::PATCH, "/v1/endpoints/five", &json_type, body).await;
        assert!(status == StatusCode::UNPROCESSABLE_ENTITY && !text.contains("planted"), "{text}");
    }
}

/// A document that is made from the source must be the committed one.
fn assert_committed(path: &str, now: &str) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let committed = std::fs::read_to_string(folder.join(path)).unwrap_or_default();
    if committed.trim() != now.trim() {
        let written = folder.join("target").join(std::path::Path::new(path).file_name().unwrap());
        std::fs::create_dir_all(folder.join("target")).unwrap();
        std::fs::write(&written, now).unwrap();
        panic!("{path} is out of date: look at the difference and copy {} over it", written.display());
    }
}

#[test]
fn the_openapi_document_is_the_committed_one() {
    assert_committed("docs/openapi.json", &openapi());
}

/// Swagger UI runs another call than the one that is shown when two go by one name.
#[test]
fn each_call_of_the_document_has_a_name_of_its_own_and_says_who_may_call() {
    let document: Value = serde_json::from_str(&openapi()).unwrap();
    let mut names = std::collections::BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for call in item.as_object().unwrap().values() {
            assert!(names.insert(call["operationId"].as_str().unwrap()), "{}", call["operationId"]);
            let keyed = path.starts_with("/v1/") || path == "/metrics";
            assert_eq!(call["responses"].get("401").is_some(), keyed, "{path}");
            assert_eq!(call.get("security").is_some(), keyed, "{path}");
        }
    }
    assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
    // An object that is joined of closed ones is matched by nothing.
    let endpoint = &document["components"]["schemas"]["NewEndpoint"];
    assert!(endpoint["allOf"].is_null() && !endpoint["properties"]["name"].is_null());
}

#[test]
fn the_page_on_errors_is_the_committed_one() {
    assert_committed("docs/errors.md", &errors_page());
}
