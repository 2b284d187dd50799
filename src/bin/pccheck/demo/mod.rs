//! `pccheck demo`: trains a real network on real digits, is killed again and again, and loses nothing.

pub mod data;
pub mod kernels;
pub mod network;
pub mod plot;
pub mod training;
