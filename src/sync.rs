//! The one file that names `core::sync::atomic`, `std` locks or `loom`: everything else imports from here.
