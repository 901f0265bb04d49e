//! Packets made and cut byte by byte, with nothing of the code that they test.
