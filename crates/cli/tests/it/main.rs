//! Integration tests of the program, with mock engines.

mod command_line;
mod configuration;
mod deploy;
mod deploy_files;
mod fleet;
mod kv_events;
mod layout;
mod load;
mod log_filter;
mod ports;
mod process;
mod record;
mod reload;
mod replay;
mod restart;
mod service_manager;
mod settings;
mod state_file;
mod verify;
