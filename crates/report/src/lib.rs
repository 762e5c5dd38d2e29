//! Reports: how results look.
//!
//! Modules, in reading order:
//!
//! | modules | content |
//! |---|---|
//! | [`table`] | tables as plain text |
//! | [`chart`], `box_plot` | pictures as SVG, without scripts |
//! | [`page`] | the frame and the style sheet of an HTML page |
//! | `comparison`, `capacity` | the text of a comparison of policies, and of a search for capacity |
//! | [`grid`] | several comparisons side by side, as text and as a page |

mod box_plot;
mod capacity;
pub mod chart;
mod comparison;
pub mod grid;
pub mod page;
pub mod table;

pub use capacity::CapacityTable;
pub use comparison::ComparisonTable;
