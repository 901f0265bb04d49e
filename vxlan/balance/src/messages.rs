//! What is asked of nftables (`include/uapi/linux/netfilter/nf_tables.h`).

use std::time::Duration;

use weft_model::Family;

use crate::{
    expression::{self, LIST_ELEMENT},
    kernel::rule_label,
    netfilter::{NFTABLES, NLM_F_APPEND, NLM_F_CREATE, Request},
    parts::{Chain, Collection, Shape, address_length},
    set::Table,
    slots::{Target, tail},
    wire::Writer,
};

pub(crate) fn make_chain(chain: &Chain) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(CHAIN_NAME, &chain.name);
    request(NEW_CHAIN, Some(Table::Inet), body).with(NLM_F_CREATE)
}

pub(crate) fn fill_chain(chain: &Chain) -> impl Iterator<Item = Request> {
    chain.rules.iter().enumerate().map(|(index, expressions)| {
        let mut body = Writer::default();
        body.text(TABLE, Table::NAME);
        body.text(RULE_CHAIN, &chain.name);
        body.nest(RULE_EXPRESSIONS, |body| body.0.extend(&expressions.0));
        let label = rule_label(&chain.name, index);
        // The form of comments in nft's user data.
        let mut comment = vec![0, label.len() as u8 + 1];
        comment.extend(label.as_bytes());
        comment.push(0);
        body.bytes(RULE_USERDATA, &comment);
        request(NEW_RULE, Some(Table::Inet), body).with(NLM_F_CREATE | NLM_F_APPEND)
    })
}

pub(crate) fn empty_chain(table: Table, name: &str) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(RULE_CHAIN, name);
    request(DELETE_RULE, Some(table), body)
}

pub(crate) fn make_collection(Collection { name, shape }: &Collection) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(SET_NAME, name);
    // The kernel wants one; it is of no use.
    body.number(SET_ID, 1);
    let size = match shape {
        Shape::Chains { slots } => {
            body.number(SET_FLAGS, SET_MAP | SET_CONSTANT);
            body.number(SET_KEY_TYPE, TYPE_INTEGER);
            body.number(SET_KEY_LENGTH, 4);
            body.number(SET_DATA_TYPE, TYPE_VERDICT);
            slots.len() as u32
        }
        Shape::Clients { family, timeout } => {
            body.number(SET_FLAGS, SET_TIMEOUT | SET_DYNAMIC);
            body.number(SET_KEY_TYPE, address_type(*family));
            body.number(SET_KEY_LENGTH, address_length(*family));
            body.bytes(SET_TIMEOUT_MS, &milliseconds(*timeout).to_be_bytes());
            MOST_CLIENTS
        }
    };
    body.nest(SET_DESCRIPTION, |description| description.number(1, size));
    request(NEW_SET, Some(Table::Inet), body).with(NLM_F_CREATE)
}

/// Fills what never changes.
pub(crate) fn fill_collection(Collection { name, shape }: &Collection) -> Vec<Request> {
    let slots: Vec<Item<'_>> = match shape {
        Shape::Chains { slots } => {
            let leads = slots.iter().map(|chain| Value::Lead(chain));
            (0u32..).zip(leads).map(|(slot, lead)| (tail(slot).to_vec(), lead)).collect()
        }
        Shape::Clients { .. } => Vec::new(),
    };
    change_elements(NEW_ELEMENT, Table::Inet, name, &slots)
}

pub(crate) fn drop_collection(table: Table, name: &str) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(SET_NAME, name);
    request(DELETE_SET, Some(table), body)
}

pub(crate) fn drop_chain(table: Table, name: &str) -> Request {
    let mut body = Writer::default();
    body.text(TABLE, Table::NAME);
    body.text(CHAIN_NAME, name);
    request(DELETE_CHAIN, Some(table), body)
}

/// What an element of a map has beside its key.
#[derive(Clone, Debug)]
pub(crate) enum Value<'a> {
    None,
    /// The chain that it leads to.
    Lead(&'a str),
    Target(Target),
    Data(&'a [u8]),
}

pub(crate) type Item<'a> = (Vec<u8>, Value<'a>);

/// Requests to add elements to one set, or to delete them.
pub(crate) fn change_elements(
    kind: u16,
    table: Table,
    set: &str,
    items: &[Item<'_>],
) -> Vec<Request> {
    let chunk = |chunk: &[Item<'_>]| {
        let mut body = Writer::default();
        body.text(TABLE, Table::NAME);
        body.text(ELEMENTS_SET, set);
        body.nest(ELEMENTS_LIST, |list| {
            for (key, value) in chunk {
                list.nest(LIST_ELEMENT, |element| {
                    element.nest(ELEMENT_KEY, |data| data.bytes(expression::DATA_VALUE, key));
                    match value {
                        Value::None => {}
                        Value::Lead(chain) => {
                            element.nest(ELEMENT_DATA, |data| expression::goto(data, chain));
                        }
                        Value::Data(bytes) => {
                            element.nest(ELEMENT_DATA, |data| {
                                data.bytes(expression::DATA_VALUE, bytes);
                            });
                        }
                        Value::Target(target) => {
                            let bytes = target.bytes();
                            element.nest(ELEMENT_DATA, |data| {
                                data.bytes(expression::DATA_VALUE, &bytes);
                            });
                        }
                    }
                });
            }
        });
        let flags = if kind == NEW_ELEMENT { NLM_F_CREATE } else { 0 };
        request(kind, Some(table), body).with(flags)
    };
    items.chunks(ELEMENTS_EACH).map(chunk).collect()
}

fn address_type(family: Family) -> u32 {
    match family {
        Family::V4 => TYPE_IPV4,
        Family::V6 => TYPE_IPV6,
    }
}

pub(crate) fn request(kind: u16, table: Option<Table>, body: Writer) -> Request {
    let family = table.map(Table::family).unwrap_or_default();
    Request { kind: NFTABLES << 8 | kind, flags: 0, family, body }
}

impl Request {
    fn with(self, flags: u16) -> Self {
        Self { flags, ..self }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// As many as fit into one attribute, whatever they are.
pub(crate) const ELEMENTS_EACH: usize = 256;
pub(crate) const MOST_CLIENTS: u32 = 65_536;

/// `include/uapi/linux/netfilter/nf_tables.h`.
pub(crate) const GET_TABLE: u16 = 1;
pub(crate) const NEW_CHAIN: u16 = 3;
pub(crate) const GET_CHAIN: u16 = 4;
pub(crate) const DELETE_CHAIN: u16 = 5;
pub(crate) const NEW_RULE: u16 = 6;
pub(crate) const GET_RULE: u16 = 7;
pub(crate) const DELETE_RULE: u16 = 8;
pub(crate) const NEW_SET: u16 = 9;
pub(crate) const GET_SET: u16 = 10;
pub(crate) const DELETE_SET: u16 = 11;
pub(crate) const NEW_ELEMENT: u16 = 12;
pub(crate) const GET_ELEMENT: u16 = 13;
pub(crate) const DELETE_ELEMENT: u16 = 14;
pub(crate) const GET_GENERATION: u16 = 16;
/// How many transactions there have been.
pub(crate) const GENERATION: u16 = 1;
/// The table's name, in every message.
pub(crate) const TABLE: u16 = 1;
pub(crate) const CHAIN_NAME: u16 = 3;
pub(crate) const RULE_CHAIN: u16 = 2;
pub(crate) const RULE_EXPRESSIONS: u16 = 4;
pub(crate) const RULE_USERDATA: u16 = 7;
pub(crate) const SET_NAME: u16 = 2;
pub(crate) const SET_FLAGS: u16 = 3;
pub(crate) const SET_KEY_TYPE: u16 = 4;
pub(crate) const SET_KEY_LENGTH: u16 = 5;
pub(crate) const SET_DATA_TYPE: u16 = 6;
pub(crate) const SET_DESCRIPTION: u16 = 9;
pub(crate) const SET_ID: u16 = 10;
pub(crate) const SET_TIMEOUT_MS: u16 = 11;
pub(crate) const SET_ANONYMOUS: u32 = 1;
pub(crate) const SET_CONSTANT: u32 = 2;
pub(crate) const SET_MAP: u32 = 8;
pub(crate) const SET_TIMEOUT: u32 = 0x10;
pub(crate) const SET_DYNAMIC: u32 = 0x20;
pub(crate) const ELEMENTS_SET: u16 = 2;
pub(crate) const ELEMENTS_LIST: u16 = 3;
pub(crate) const ELEMENT_KEY: u16 = 1;
pub(crate) const ELEMENT_DATA: u16 = 2;
pub(crate) const ELEMENT_EXPRESSION: u16 = 7;
pub(crate) const ELEMENT_EXPRESSIONS: u16 = 11;
/// `NFT_DATA_VERDICT`.
pub(crate) const TYPE_VERDICT: u32 = 0xffff_ff00;
/// nft's own numbers for types, by which it prints keys and values.
pub(crate) const TYPE_INTEGER: u32 = 4;
pub(crate) const TYPE_IPV4: u32 = 7;
pub(crate) const TYPE_IPV6: u32 = 8;
