use std::collections::BTreeSet;

use serde::{Serialize, Serializer, de::DeserializeOwned};
use weft_model::{
    Condition, Endpoint, EndpointId, HoldRecord, LoanRecord, NetworkRecord, Node, ServiceRecord,
    ServiceState, WantRecord,
};

use super::Key;

/// What a node says under one of its keys.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Record {
    Node(Node),
    Network(NetworkRecord),
    /// All endpoints of one bucket; none once the last has gone.
    Endpoints(Vec<Endpoint>),
    Loan(LoanRecord),
    Hold(HoldRecord),
    Want(WantRecord),
    /// All services of one bucket.
    Services(Vec<ServiceRecord>),
    /// Those of the endpoints of one bucket that there is something to say about.
    Conditions(Vec<Condition>),
    Drained(BTreeSet<EndpointId>),
}

impl Record {
    /// Whether the record is of the kind that `key` names, and belongs to its network.
    pub(crate) fn fits(&self, key: Key) -> bool {
        match (self, key) {
            (Self::Network(NetworkRecord::Defined(network)), Key::Network(id)) => network.id == id,
            (Self::Endpoints(endpoints), Key::Endpoints(id, _)) => {
                endpoints.iter().all(|endpoint| endpoint.network == id)
            }
            (Self::Services(services), Key::Services(id, _)) => {
                services.iter().all(|record| match &record.state {
                    ServiceState::Defined(service) => {
                        service.network == id && service.name == record.name
                    }
                    ServiceState::Removed => true,
                })
            }
            (Self::Node(_), Key::Node)
            | (Self::Network(NetworkRecord::Removed), Key::Network(_))
            | (Self::Loan(_), Key::Loan(_))
            | (Self::Hold(_), Key::Hold(_))
            | (Self::Want(_), Key::Want(_))
            | (Self::Conditions(_), Key::Conditions(..))
            | (Self::Drained(_), Key::Drained(_)) => true,
            (
                Self::Node(_)
                | Self::Network(_)
                | Self::Endpoints(_)
                | Self::Loan(_)
                | Self::Hold(_)
                | Self::Want(_)
                | Self::Services(_)
                | Self::Conditions(_)
                | Self::Drained(_),
                _,
            ) => false,
        }
    }

    /// Reads the record of `key` with `read`, which is called for the one type that fits it.
    pub(crate) fn read<E>(key: Key, read: impl ReadRecord<Error = E>) -> Result<Option<Self>, E> {
        Ok(match key {
            Key::Node => read.read()?.map(Self::Node),
            Key::Network(_) => read.read()?.map(Self::Network),
            Key::Endpoints(..) => read.read()?.map(Self::Endpoints),
            Key::Loan(_) => read.read()?.map(Self::Loan),
            Key::Hold(_) => read.read()?.map(Self::Hold),
            Key::Want(_) => read.read()?.map(Self::Want),
            Key::Services(..) => read.read()?.map(Self::Services),
            Key::Conditions(..) => read.read()?.map(Self::Conditions),
            Key::Drained(_) => read.read()?.map(Self::Drained),
        })
    }
}

/// Reads a record whose type the key decides.
pub(crate) trait ReadRecord {
    type Error;

    fn read<T: DeserializeOwned>(self) -> Result<Option<T>, Self::Error>;
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Node(node) => node.serialize(serializer),
            Self::Network(network) => network.serialize(serializer),
            Self::Endpoints(endpoints) => endpoints.serialize(serializer),
            Self::Loan(loans) => loans.serialize(serializer),
            Self::Hold(holds) => holds.serialize(serializer),
            Self::Want(wants) => wants.serialize(serializer),
            Self::Services(services) => services.serialize(serializer),
            Self::Conditions(conditions) => conditions.serialize(serializer),
            Self::Drained(endpoints) => endpoints.serialize(serializer),
        }
    }
}
