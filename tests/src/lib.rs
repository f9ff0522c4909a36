//! A real hub and real agents, as processes, for the scenario files beside this library.
