//! Tests of what only PostgreSQL does. `real` needs a server.

use super::*;

mod real;
