//! Messages to the service manager that started the router, such as systemd.
//!
//! The protocol is that of `sd_notify(3)`: datagrams to the socket that the variable `NOTIFY_SOCKET`
//! names. Without the variable, nothing is sent.

use sd_notify::NotifyState;

/// Reports that the router accepts connections, at the start or after a reload.
pub(super) fn report_ready() {
    report(&[NotifyState::Ready]);
}

/// Reports that the router reads its configuration again. [`report_ready`] must follow.
pub(super) fn report_reloading() {
    // systemd compares this time with that of its own request, to match one with the other.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => report(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "cannot read the monotonic clock"),
    }
}

/// Reports that the router has begun to stop.
pub(super) fn report_stopping() {
    report(&[NotifyState::Stopping]);
}

/// Sends states in one message.
fn report(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(
            %error,
            "cannot send a message to the service manager; check the socket that NOTIFY_SOCKET names"
        );
    }
}
