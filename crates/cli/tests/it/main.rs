//! Integration tests of the program, with simulated engines behind it.

mod fleet;
mod kv_events;
mod ports;
mod record;
mod replay;
mod verify;
