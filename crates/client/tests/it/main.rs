//! Integration tests of the load client.

mod load;
