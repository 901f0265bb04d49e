//! Container engines: what they ask for in their own words, turned into requests to the ledger.

pub mod docker;
