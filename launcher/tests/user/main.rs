//! The program as a user runs it: nothing is replaced, and the guests are real if small.

mod command_line;
mod lifecycle;
mod world;
