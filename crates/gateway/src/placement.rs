//! Placement of a request: read its body, tokenise and hash its prompts, route and book it.
//!
//! Nothing here knows sockets or HTTP: a front end passes bytes in and gets bookings out.

pub(crate) mod affinity;
pub(crate) mod dispatch;
pub(crate) mod hints;
pub(crate) mod parsed_request;
pub(crate) mod placed_request;
pub(crate) mod response_observer;
