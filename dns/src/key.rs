//! The order in which names are stored and compared.

/// A name as the tables hold it: labels from the root down, lower-cased, joined by dots.
///
/// `tasks.web.app` is `app.web.tasks`: what lies below a name is then what its key is a prefix of.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Key(String);

impl Key {
    /// Reads labels in the usual order, the leftmost first.
    pub(crate) fn of<'a>(labels: impl DoubleEndedIterator<Item = &'a str>) -> Self {
        let mut text = String::new();
        Self::write(&mut text, labels);
        Self(text)
    }

    /// Reads labels from the wire, the leftmost first, the root not among them. A byte that no name
    /// of ours has becomes one that cannot match.
    pub(crate) fn of_wire<'a>(labels: impl DoubleEndedIterator<Item = &'a [u8]>) -> Self {
        let mut text = String::with_capacity(64);
        for label in labels.rev() {
            if !text.is_empty() {
                text.push('.');
            }
            text.extend(label.iter().map(|&byte| match byte {
                b'-' | b'_' => char::from(byte),
                _ if byte.is_ascii_alphanumeric() => char::from(byte.to_ascii_lowercase()),
                _ => '?',
            }));
        }
        Self(text)
    }

    /// Appends the key of `labels` to `text`.
    pub(crate) fn write<'a>(text: &mut String, labels: impl DoubleEndedIterator<Item = &'a str>) {
        let start = text.len();
        for label in labels.rev() {
            if text.len() > start {
                text.push('.');
            }
            text.push_str(label);
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn into_string(self) -> String {
        self.0
    }

    pub(crate) fn labels(&self) -> impl Iterator<Item = &str> {
        self.0.split('.').filter(|label| !label.is_empty())
    }

    pub(crate) fn label_count(&self) -> usize {
        self.labels().count()
    }

    /// What of this key lies below `ancestor`.
    pub(crate) fn below(&self, ancestor: &Self) -> Option<&str> {
        crate::zone::below(&self.0, &ancestor.0)
    }
}
