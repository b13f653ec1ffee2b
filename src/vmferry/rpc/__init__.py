"""Conversions and statuses that every gRPC edge shares."""
