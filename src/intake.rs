//! Enters: validated messages are stored by group commit.
