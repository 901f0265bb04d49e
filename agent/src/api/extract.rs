//! Reading requests and writing refusals, so that every bad input is answered alike.

use axum::{
    Json,
    extract::{FromRequest, FromRequestParts, Query, Request},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use serde::de::DeserializeOwned;

use super::types::Problem;
use crate::refusal::{Refusal, RefusalKind};

/// A JSON body; one that does not fit is refused with the place and the reason.
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let bytes = axum::body::Bytes::from_request(request, state)
            .await
            .map_err(IntoResponse::into_response)?;
        let mut json = serde_json::Deserializer::from_slice(&bytes);
        serde_path_to_error::deserialize(&mut json).map(Self).map_err(|error| misfit(&error))
    }
}

/// Query parameters.
pub(crate) struct Params<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        Query::try_from_uri(&parts.uri)
            .map(|Query(params)| Self(params))
            .map_err(|error| invalid(format!("the request's parameters do not fit: {error}")))
    }
}

/// Refuses a body, and names the field that does not fit.
fn misfit(error: &serde_path_to_error::Error<serde_json::Error>) -> Response {
    let why = error.inner();
    let field = Some(error.path().to_string()).filter(|path| path != ".");
    let error = match &field {
        Some(field) => format!("{field} does not fit: {why}"),
        None => format!("the request's body does not fit: {why}"),
    };
    (StatusCode::BAD_REQUEST, Json(Problem { error, field })).into_response()
}

fn invalid(error: String) -> Response {
    (StatusCode::BAD_REQUEST, Json(Problem { error, field: None })).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.kind {
            RefusalKind::Invalid => StatusCode::BAD_REQUEST,
            RefusalKind::Missing => StatusCode::NOT_FOUND,
            RefusalKind::Conflict => StatusCode::CONFLICT,
            RefusalKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            RefusalKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let problem = Problem { error: self.message, field: self.field.map(Into::into) };
        (status, Json(problem)).into_response()
    }
}
