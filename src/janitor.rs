//! Heals what died.
