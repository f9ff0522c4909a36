//! The API as an OpenAPI document, made from the table of routes.

use std::sync::OnceLock;

use axum::body::Body;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Response};
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::error::Document;
use super::routes::{ROUTES, Route, Shape, Who};
use super::sse;

/// The document; the same for everybody.
pub(super) fn response() -> Response<Body> {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| document().to_string());
    let mut response = Response::new(Body::from(text.as_str()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

pub(super) fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut generator = settings.into_generator();
    let problem = generator.subschema_for::<Document>();
    let mut paths = Map::new();
    for route in ROUTES {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.verb.word()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "cortex mesh hub",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Each route is a call of the service that the command line uses, with the same rights; what is not among them is the command line's.",
        },
        "paths": paths,
        "components": {
            "schemas": generator.take_definitions(true),
            "responses": {
                "problem": {
                    "description": "Why it was not carried out",
                    "content": { "application/problem+json": { "schema": problem } },
                },
            },
            "securitySchemes": {
                "session": { "type": "apiKey", "in": "cookie", "name": "__Host-cortex" },
                "bearer": { "type": "http", "scheme": "bearer" },
                "certificate": { "type": "mutualTLS" },
            },
        },
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut parameters: Vec<Value> = route
        .path
        .split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            let schema = json!({ "type": "string" });
            json!({ "name": name, "in": "path", "required": true, "schema": schema })
        })
        .collect();
    parameters.extend(query(route, generator));
    let (media, answer) = match route.answer {
        Shape::One(schema) => ("application/json", schema(generator)),
        Shape::Each(schema) => {
            parameters.push(json!({
                "name": "Last-Event-ID",
                "in": "header",
                "required": false,
                "description": "The last id that was received: what comes after it.",
                "schema": { "type": "string" },
            }));
            (sse::MEDIA_TYPE, schema(generator))
        }
    };
    let mut operation = json!({
        "summary": route.summary,
        "parameters": parameters,
        "responses": {
            "200": {
                "description": "It was carried out",
                "content": { media: { "schema": answer } },
            },
            "default": { "$ref": "#/components/responses/problem" },
        },
    });
    if let Some(body) = route.body {
        let schema = body(generator);
        operation["requestBody"] =
            json!({ "required": true, "content": { "application/json": { "schema": schema } } });
    }
    operation["security"] = match route.who {
        Who::Anyone => json!([]),
        Who::Caller(_) => json!([{ "session": [] }, { "bearer": [] }, { "certificate": [] }]),
    };
    if let Who::Caller(method) = route.who {
        operation["x-cortex-call"] = method.into();
    }
    operation
}

/// The fields of the query's type as parameters.
fn query(route: &Route, generator: &mut SchemaGenerator) -> Vec<Value> {
    let schema = (route.query)(generator).to_value();
    let Some(fields) = schema.get("properties").and_then(Value::as_object) else {
        return Vec::new();
    };
    let parameter = |(name, schema): (&String, &Value)| {
        let mut schema = schema.clone();
        let description = schema.as_object_mut().and_then(|fields| fields.remove("description"));
        json!({
            "name": name,
            "in": "query",
            "required": false,
            "description": description,
            "schema": schema,
        })
    };
    fields.iter().map(parameter).collect()
}
