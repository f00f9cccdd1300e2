//! Answers: small texts, and artifacts straight from their chunks.

use std::convert::Infallible;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use hyper::{Response, StatusCode, header};
use millrace_shards::chunk::{Body, BodySlices};
use serde::Serialize;

use super::idle_deadline::IdleDeadline;

/// Bytes handed to hyper at once.
const SLICE_BYTES: usize = 256 << 10;

/// The body of an answer.
pub(super) enum Reply {
    Text(Option<Bytes>),
    Artifact {
        slices: BodySlices,
        left: u64,
        deadline: Rc<IdleDeadline>,
    },
}

impl HttpBody for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let bytes = match &mut *self {
            Self::Text(text) => text.take(),
            Self::Artifact {
                slices,
                left,
                deadline,
            } => {
                // hyper asks for more when the client has taken most of the last piece.
                deadline.extend();
                slices.next().map(|slice| {
                    *left -= slice.len() as u64;
                    Bytes::from_owner(slice)
                })
            }
        };
        Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Self::Artifact { left, .. } => SizeHint::with_exact(*left),
        }
    }
}

pub(super) type Answer = Response<Reply>;

pub(super) fn text(status: StatusCode, content_type: &'static str, text: String) -> Answer {
    with(status, content_type, Reply::Text(Some(text.into())))
}

/// A line that says why not.
pub(super) fn refusal(status: StatusCode, why: impl std::fmt::Display) -> Answer {
    text(status, "text/plain; charset=utf-8", format!("{why}\n"))
}

pub(super) fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(document) => text(StatusCode::OK, "application/json", format!("{document}\n")),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, error),
    }
}

pub(super) fn artifact(body: &Body, deadline: Rc<IdleDeadline>) -> Answer {
    let slices = body.slices(SLICE_BYTES);
    let reply = Reply::Artifact {
        slices,
        left: body.len() as u64,
        deadline,
    };
    with(StatusCode::OK, "application/octet-stream", reply)
}

fn with(status: StatusCode, content_type: &'static str, body: Reply) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let content_type = header::HeaderValue::from_static(content_type);
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    answer
}
