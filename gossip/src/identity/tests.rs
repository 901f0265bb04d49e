use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;
use time::macros::datetime;

use super::*;

const NOW: OffsetDateTime = datetime!(2026-01-01 12:00 UTC);

fn init(state_dir: &Path) -> Result<Identity, IdentityError> {
    Identity::init(state_dir, "alpha".parse().unwrap(), NODE_VALIDITY, NOW)
}

#[test]
fn a_new_cluster_is_read_back_as_it_was_made() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("state");
    let made = init(&state_dir).unwrap();
    let loaded = Identity::load(&state_dir).unwrap();

    assert_eq!(loaded.cluster(), made.cluster());
    assert_eq!(loaded.node(), made.node());
    assert_eq!(loaded.name().as_str(), "alpha");
    assert_eq!(loaded.certificate(), made.certificate());
    assert_eq!(loaded.certificate().name(), Some("alpha"));
    let subject = Subject::Node { cluster: made.cluster(), node: made.node() };
    assert_eq!(*loaded.certificate().subject(), subject);
    assert_eq!(*loaded.ca().subject(), Subject::Authority);
    assert_eq!(loaded.certificate().validity(), Validity::starting(NOW, NODE_VALIDITY));
    assert!(loaded.issuer().is_some());
}

#[test]
fn keys_are_readable_by_their_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let state_dir = dir.path().join("state");
    init(&state_dir).unwrap();

    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state_dir), 0o700);
    let identity = directory_in(&state_dir);
    assert_eq!(mode(&identity), 0o700);
    for entry in std::fs::read_dir(&identity).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn a_second_cluster_is_refused_and_the_first_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let first = init(dir.path()).unwrap();
    let error = init(dir.path()).unwrap_err().to_string();

    assert!(error.contains(&first.cluster().to_string()), "{error}");
    assert!(error.contains("node alpha") && error.contains("remove"), "{error}");
    assert_eq!(Identity::load(dir.path()).unwrap().node(), first.node());
}

#[test]
fn what_a_crash_left_is_no_identity_and_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let unfinished = dir.path().join(".identity-0123");
    std::fs::create_dir(&unfinished).unwrap();
    std::fs::write(unfinished.join(NODE_KEY), "half a k").unwrap();

    let error = Identity::load(dir.path()).unwrap_err();
    assert!(matches!(error, IdentityError::NotInitialised { .. }), "{error}");
    init(dir.path()).unwrap();
    assert!(!unfinished.exists());
}

#[test]
fn each_file_that_is_absent_or_damaged_is_named() {
    for name in [ABOUT, NODE_KEY, NODE_CERTIFICATE, CA_CERTIFICATE, CA_KEY] {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path()).unwrap();
        let path = directory_in(dir.path()).join(name);
        std::fs::write(&path, "garbage").unwrap();
        let error = Identity::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("cannot be used"), "{error}");

        std::fs::remove_file(&path).unwrap();
        match Identity::load(dir.path()) {
            Ok(identity) => assert!(name == CA_KEY && identity.issuer().is_none(), "{name}"),
            Err(error) => assert!(error.to_string().contains(&format!("{name} is missing"))),
        }
    }
}

#[test]
fn a_key_of_another_node_is_noticed() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    init(one.path()).unwrap();
    init(other.path()).unwrap();
    for name in [NODE_KEY, CA_KEY] {
        let from = directory_in(other.path()).join(name);
        let to = directory_in(one.path()).join(name);
        let own = std::fs::read(&to).unwrap();
        std::fs::copy(from, &to).unwrap();
        let error = Identity::load(one.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Mismatch { .. }), "{error}");
        std::fs::write(&to, own).unwrap();
    }
}

#[test]
fn the_generation_grows_even_if_the_clock_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let identity = init(dir.path()).unwrap();
    let first = identity.next_generation(NOW).unwrap();
    assert_eq!(first, 1_767_268_800);
    let back = NOW - Duration::from_secs(86_400);
    assert_eq!(Identity::load(dir.path()).unwrap().next_generation(back).unwrap(), first + 1);
    assert_eq!(identity.next_generation(back).unwrap(), first + 2);
}

#[test]
fn a_renewed_certificate_replaces_the_old_one_and_no_other_node_s_does() {
    let dir = tempfile::tempdir().unwrap();
    let identity = init(dir.path()).unwrap();
    let authority = &identity.issuer().unwrap().authority;
    let validity = Validity::starting(NOW + Duration::from_secs(86_400), NODE_VALIDITY);
    let newer = authority.issue(&identity.key().public_key(), identity.name(), validity);
    identity.renewed(newer.clone()).unwrap();
    assert_eq!(*Identity::load(dir.path()).unwrap().certificate(), newer);

    let stranger = PrivateKey::generate().public_key();
    let foreign = authority.issue(&stranger, identity.name(), validity);
    assert!(matches!(identity.renewed(foreign), Err(IdentityError::Mismatch { .. })));
}

#[test]
fn an_interrupted_join_finds_its_key_again() {
    let dir = tempfile::tempdir().unwrap();
    let token = TokenId::from([1; 8]);
    let key = PendingKey::obtain(dir.path(), token).unwrap().key.public_key();
    let again = PendingKey::obtain(dir.path(), token).unwrap();
    assert_eq!(again.key.public_key(), key);
    again.discard().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_certificate_is_renewed_after_two_thirds_of_its_life() {
    let validity = Validity::starting(NOW, 30 * Duration::from_secs(86_400) - BACKDATING);
    assert_eq!(validity.renew_at(), NOW - BACKDATING + Duration::from_secs(20 * 86_400));
    assert_eq!(validity.length() + BACKDATING, Duration::from_secs(30 * 86_400));
}

proptest! {
    #[test]
    fn no_bytes_make_the_reading_of_a_certificate_panic(
        at in 0usize..400, with: u8, garbage in proptest::collection::vec(any::<u8>(), 0..300)
    ) {
        let authority = Authority::generate(ClusterId::from([1; 16]), NOW);
        let mut der = authority.certificate().der().to_vec();
        let at = at.min(der.len() - 1);
        der[at] = with;
        let _ = Certificate::from_der(&der);
        let _ = Certificate::from_der(&der[..at]);
        let _ = Certificate::from_der(&garbage);
        let _ = Certificate::from_pem(&garbage);
    }
}
