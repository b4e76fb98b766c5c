"""One address for several engines and upstreams that speak OpenAI's API: `create_router_app`."""
