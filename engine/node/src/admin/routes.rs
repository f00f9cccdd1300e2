//! What the admin socket answers.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode, header};
use millrace_protocol::id::ArtifactId;
use millrace_shards::chunk::Body;

use super::idle_deadline::IdleDeadline;
use super::reply::{self, Answer};
use crate::core::Core;
use crate::metrics;
use crate::reference::{FetchError, Hasher};
use crate::status::{self, Published};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

/// When peers are asked once more of which one was busy: its answers to this node wait, and leave
/// it within milliseconds on a path that works.
const ASK_AGAIN: Duration = Duration::from_millis(200);

pub(super) async fn answer(
    request: Request<Incoming>,
    core: Arc<Core>,
    deadline: Rc<IdleDeadline>,
) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    let method = request.method().clone();
    let artifact = path.strip_prefix("/artifacts/");
    Ok(match (method, path.as_str(), artifact) {
        (Method::GET, "/metrics", _) => match metrics::render(&core) {
            Ok(text) => reply::text(StatusCode::OK, OPEN_METRICS, text),
            Err(error) => reply::refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
        },
        (Method::GET, "/healthz", _) => match core.health() {
            Ok(()) => reply::text(StatusCode::OK, PLAIN, "ok\n".into()),
            Err(why) => reply::refusal(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        (Method::GET, "/readyz", _) => match core.readiness() {
            Ok(()) => reply::text(StatusCode::OK, PLAIN, "ready\n".into()),
            Err(why) => reply::refusal(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        (Method::GET, "/status", _) => reply::json(&status::of(&core)),
        (Method::GET, _, Some(id)) => get(id, &core, deadline).await,
        (Method::POST, "/artifacts", _) => put(request, &core, &deadline).await,
        (_, "/metrics" | "/healthz" | "/readyz" | "/status" | "/artifacts", _)
        | (_, _, Some(_)) => reply::refusal(
            StatusCode::METHOD_NOT_ALLOWED,
            "this path has another method",
        ),
        _ => reply::refusal(
            StatusCode::NOT_FOUND,
            "paths: /metrics /healthz /readyz /status /artifacts /artifacts/ID",
        ),
    })
}

async fn get(id: &str, core: &Core, deadline: Rc<IdleDeadline>) -> Answer {
    let Ok(id) = id.parse::<ArtifactId>() else {
        return reply::refusal(StatusCode::BAD_REQUEST, "an id is 64 hexadecimal digits");
    };
    let mut fetched = core.artifacts.fetch(id).await;
    if fetched.as_ref().is_err_and(FetchError::is_for_now) {
        glommio::timer::sleep(ASK_AGAIN).await;
        fetched = core.artifacts.fetch(id).await;
    }
    match fetched {
        Ok(body) => reply::artifact(&body, deadline),
        Err(error @ FetchError::NotFound { .. }) => reply::refusal(StatusCode::NOT_FOUND, error),
        Err(error @ (FetchError::Unavailable { .. } | FetchError::PoolFull)) => {
            reply::refusal(StatusCode::SERVICE_UNAVAILABLE, error)
        }
    }
}

async fn put(request: Request<Incoming>, core: &Core, deadline: &IdleDeadline) -> Answer {
    let length = match announced_length(&request, core) {
        Ok(length) => length,
        Err(refusal) => return *refusal,
    };
    let (id, body) = match receive(request.into_body(), length, core, deadline).await {
        Ok(received) => received,
        Err(refusal) => return *refusal,
    };
    let bytes = body.len() as u64;
    match core.artifacts.publish(id, body).await {
        Ok(deliveries) => reply::json(&Published::of(id, bytes, &deliveries)),
        Err(failure) => reply::refusal(StatusCode::PAYLOAD_TOO_LARGE, failure),
    }
}

fn announced_length(request: &Request<Incoming>, core: &Core) -> Result<usize, Box<Answer>> {
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    let Some(announced) = announced else {
        let why = "the length of the body must be announced";
        return Err(Box::new(reply::refusal(StatusCode::LENGTH_REQUIRED, why)));
    };
    let length = usize::try_from(announced)
        .ok()
        .filter(|_| announced <= core.artifacts.body_bytes_max());
    length.ok_or_else(|| {
        let why = format!(
            "{announced} bytes; at most {} are accepted",
            core.artifacts.body_bytes_max()
        );
        Box::new(reply::refusal(StatusCode::PAYLOAD_TOO_LARGE, why))
    })
}

/// The body, from the socket's buffer into its place, hashed on the way.
async fn receive(
    mut incoming: Incoming,
    length: usize,
    core: &Core,
    deadline: &IdleDeadline,
) -> Result<(ArtifactId, Body), Box<Answer>> {
    let refuse = |status, why: &str| Box::new(reply::refusal(status, why));
    let Some(mut body) = core.artifacts.reserve(length) else {
        return Err(refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "the chunk pool is full",
        ));
    };
    let mut hasher = Hasher::new();
    deadline.extend();
    while let Some(frame) = incoming.frame().await {
        let Ok(frame) = frame else {
            return Err(refuse(StatusCode::BAD_REQUEST, "the body ended early"));
        };
        deadline.extend();
        let Ok(data) = frame.into_data() else {
            continue;
        };
        hasher.update(&data);
        let mut rest = &data[..];
        while !rest.is_empty() {
            let spare = body.spare();
            if spare.is_empty() {
                return Err(refuse(
                    StatusCode::BAD_REQUEST,
                    "the body is longer than announced",
                ));
            }
            let (now, later) = rest.split_at(rest.len().min(spare.len()));
            spare[..now.len()].copy_from_slice(now);
            body.advance(now.len());
            rest = later;
        }
    }
    deadline.suspend();
    if !body.is_full() {
        return Err(refuse(
            StatusCode::BAD_REQUEST,
            "the body is shorter than announced",
        ));
    }
    Ok((hasher.finish(), body.freeze()))
}
