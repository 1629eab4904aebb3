//! What the OpenAPI document says of every call alike: the words for a status, who may call, what may go wrong.

use utoipa::Modify;
use utoipa::openapi::path::Operation;
use utoipa::openapi::schema::{Object, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Components, ContentBuilder, Header, OpenApi, Ref, RefOr, Response, ResponseBuilder};

use crate::message::Status;

/// The name of the security scheme in the document.
const KEY: &str = "key";

/// A status.
pub(super) fn status() -> Object {
    let words = Status::ALL.map(|status| status.to_string());
    ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(words))
        .examples([serde_json::json!("dead")])
        .build()
}

/// A status, or none.
pub(super) fn status_or_null() -> Object {
    let words = Status::ALL.map(|status| serde_json::json!(status.to_string()));
    ObjectBuilder::new()
        .schema_type(SchemaType::from_iter([Type::String, Type::Null]))
        .enum_values(Some(words.into_iter().chain([serde_json::Value::Null])))
        .examples([serde_json::json!("dead")])
        .build()
}

/// Adds to each call that tells or changes something of messages how a key is shown, and what is answered
/// without one.
pub(super) struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut OpenApi) {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        document.components.get_or_insert_with(Components::new).add_security_scheme(KEY, scheme);
        for (path, item) in &mut document.paths.paths {
            let calls =
                [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete].into_iter().flatten();
            for call in calls {
                let keyed = path.starts_with("/v1/") || path == "/metrics";
                complete(call, keyed);
            }
        }
    }
}

fn complete(call: &mut Operation, keyed: bool) {
    let mut add = |status: &str, description: &str| {
        call.responses.responses.insert(status.to_owned(), RefOr::T(problem(description)));
    };
    add("403", "The Host or Origin is not allowed, or the key has not the scope");
    if !keyed {
        return;
    }
    add("401", "A key is needed, or this one is unknown, revoked or expired");
    // A key may be left out where the API listens on the loopback only.
    call.security = Some(vec![SecurityRequirement::new(KEY, [""; 0]), SecurityRequirement::default()]);
    if let Some(RefOr::T(away)) = call.responses.responses.get_mut("503") {
        let mut seconds = Header::new(ObjectBuilder::new().schema_type(Type::Integer).build());
        seconds.description = Some("Seconds to wait before the next try".to_owned());
        away.headers.insert("Retry-After".to_owned(), seconds.into());
    }
}

fn problem(description: &str) -> Response {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    ResponseBuilder::new().description(description).content("application/problem+json", body).build()
}
