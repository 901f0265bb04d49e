use tokio::sync::oneshot;
use weft_model::NodeId;

use crate::{
    ForgetError, Record,
    table::{EncodeError, Key},
};

/// What the replicator is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    Publish { records: Vec<(Key, Option<Record>)>, reply: oneshot::Sender<Vec<EncodeError>> },
    Leave { reply: oneshot::Sender<usize> },
    Forget { node: NodeId, reply: oneshot::Sender<Result<(), ForgetError>> },
}
