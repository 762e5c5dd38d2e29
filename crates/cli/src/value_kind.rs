//! The kind of a flag's value, by its parser.

use std::any::TypeId;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::Arg;
use clap::builder::PossibleValue;

use crate::admin_address::AdminAddress;
use crate::values::{Fraction, Size, Workers};

/// The kind of an argument's value, which determines its type in the reference and its form in
/// TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Flag,
    Switch,
    Integer,
    Number,
    Fraction,
    Duration,
    Size,
    Address,
    Path,
    Workers,
    Choice,
    Text,
}

impl Kind {
    /// Returns the kind of an argument, from its parser. A parser of a type that is not known here
    /// is a choice if it lists its values, otherwise text.
    pub(crate) fn of(argument: &Arg) -> Self {
        if !argument.get_action().takes_values() {
            return Self::Flag;
        }
        let parser = argument.get_value_parser();
        let possible: Vec<_> = parser.possible_values().into_iter().flatten().collect();
        let names: Vec<_> = possible.iter().map(PossibleValue::get_name).collect();
        if names == ["on", "off"] {
            return Self::Switch;
        }
        let value = parser.type_id();
        let is_any = |types: &[TypeId]| types.iter().any(|known| value == *known);
        if is_any(&[
            TypeId::of::<u16>(),
            TypeId::of::<u32>(),
            TypeId::of::<u64>(),
            TypeId::of::<usize>(),
            TypeId::of::<NonZeroU32>(),
            TypeId::of::<NonZeroU64>(),
            TypeId::of::<NonZeroUsize>(),
        ]) {
            Self::Integer
        } else if is_any(&[TypeId::of::<f64>()]) {
            Self::Number
        } else if is_any(&[TypeId::of::<Fraction>()]) {
            Self::Fraction
        } else if is_any(&[TypeId::of::<humantime::Duration>()]) {
            Self::Duration
        } else if is_any(&[TypeId::of::<Size>()]) {
            Self::Size
        } else if is_any(&[TypeId::of::<SocketAddr>(), TypeId::of::<AdminAddress>()]) {
            Self::Address
        } else if is_any(&[TypeId::of::<PathBuf>()]) {
            Self::Path
        } else if is_any(&[TypeId::of::<Workers>()]) {
            Self::Workers
        } else if !names.is_empty() {
            Self::Choice
        } else {
            Self::Text
        }
    }

    /// Returns the kind's name in the reference of settings.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Switch => "`on` or `off`",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Fraction => "number from 0 to 1",
            Self::Duration => "duration",
            Self::Size => "size",
            Self::Address => "address",
            Self::Path => "path",
            Self::Workers => "workers",
            Self::Choice => "name",
            Self::Text => "text",
        }
    }

    /// Returns whether TOML has a number for this kind, without quotes.
    pub(crate) fn is_numeric(self) -> bool {
        matches!(self, Self::Integer | Self::Number | Self::Fraction)
    }
}
