//! What an engine puts on a plugin's standard input: bounded in length and time.

use std::{
    io::{self, Read},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The most that is read.
const MOST: usize = 1 << 20;
/// How long an engine may take to write it all.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    #[error("standard input is longer than {MOST} bytes")]
    TooLong,
    #[error("standard input did not end within {} s", PATIENCE.as_secs())]
    Late,
    #[error("cannot read standard input")]
    Unreadable(#[from] io::Error),
}

/// Reads `source` to its end.
///
/// # Errors
///
/// It does not end in time, or is too long.
pub(crate) fn read(source: &mut (impl Read + AsFd)) -> Result<Vec<u8>, InputError> {
    read_within(source, MOST, PATIENCE)
}

fn read_within(
    source: &mut (impl Read + AsFd),
    most: usize,
    patience: Duration,
) -> Result<Vec<u8>, InputError> {
    let start = Instant::now();
    let (mut input, mut chunk) = (Vec::new(), [0; 8192]);
    loop {
        let left = patience.saturating_sub(start.elapsed());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut ready = [PollFd::new(source.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, timeout).map_err(io::Error::from)? == 0 {
            return Err(InputError::Late);
        }
        match source.read(&mut chunk)? {
            0 => return Ok(input),
            length => input.extend_from_slice(&chunk[..length]),
        }
        if input.len() > most {
            return Err(InputError::TooLong);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write};

    use super::*;

    fn pipe() -> (File, File) {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        (reader.into(), writer.into())
    }

    #[test]
    fn an_input_is_read_to_its_end() {
        let (mut reader, mut writer) = pipe();
        writer.write_all(b"{}").unwrap();
        drop(writer);
        assert_eq!(read(&mut reader).unwrap(), b"{}");
    }

    #[test]
    fn one_without_an_end_and_one_too_long_are_refused() {
        let (mut reader, mut writer) = pipe();
        writer.write_all(&[b' '; 100]).unwrap();
        let late = read_within(&mut reader, 1000, Duration::from_millis(20));
        assert!(matches!(late, Err(InputError::Late)), "{late:?}");
        writer.write_all(&[b' '; 100]).unwrap();
        let long = read_within(&mut reader, 50, Duration::from_secs(5));
        assert!(matches!(long, Err(InputError::TooLong)), "{long:?}");
    }
}
