//! What a frame means: headers, super-frames and their segments, answers that need no peer.
