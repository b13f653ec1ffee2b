"""What every gRPC edge shares: conversions and statuses."""
