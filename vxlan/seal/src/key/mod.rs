//! Packets and their keys: the wire format, derivation, sealing and opening, replay.
