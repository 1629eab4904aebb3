//! The cache's conformance suite: what every backend must do.

use super::{Cache, Response};
use crate::clock::Timestamp;
use crate::message::MessageId;

fn response(text: &str) -> Response {
    Response {
        message: Some(text.to_owned()),
        message_id: Some("67f2f8a8-ea58-4ed0-a6f9-ff217df4d849".to_owned()),
        status: 202,
        timestamp: Timestamp::from_micros(1_800_000_000_123_456),
    }
}

/// Runs the whole suite on a cache that others may use too.
pub(crate) async fn all(cache: &dyn Cache) {
    let base = fastrand::i64(1 << 40..1 << 60);
    let id = |i| MessageId(base + i);
    cache.ping().await.unwrap();
    assert_eq!(cache.get(id(1)).await.unwrap(), None);

    let many: Vec<_> = (0..500).map(|i| (id(i), response(&format!("answer {i}")))).collect();
    cache.put(&many).await.unwrap();
    for (id, response) in [&many[0], &many[499]] {
        assert_eq!(cache.get(*id).await.unwrap().as_ref(), Some(response));
    }
    assert_eq!(cache.get(id(500)).await.unwrap(), None);

    cache.put(&[(id(1), response("newer"))]).await.unwrap();
    assert_eq!(cache.get(id(1)).await.unwrap(), Some(response("newer")));
    cache.put(&[]).await.unwrap();

    let bare = Response { message: None, message_id: None, ..response("") };
    cache.put(&[(id(2), bare.clone())]).await.unwrap();
    assert_eq!(cache.get(id(2)).await.unwrap(), Some(bare));
}
