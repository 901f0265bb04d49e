# Two groups on weft's network `app`. Each allocation is found from every container of the network by
# its group, by GROUP.JOB (web.shop), and by GROUP and the first eight characters of its id.

job "shop" {
  group "web" {
    count = 2

    network {
      mode = "cni/app-ports"

      port "http" {
        static = 8080
        to     = 80
      }

      # Names beside those that Nomad tells by itself.
      cni {
        args = {
          WEFT_ALIASES = "frontend"
        }
      }
    }

    task "nginx" {
      driver = "docker"

      config {
        image = "nginx:alpine"
        ports = ["http"]
      }
    }
  }

  group "probe" {
    network {
      mode = "cni/app"
    }

    task "wget" {
      driver = "docker"

      config {
        image   = "alpine:3"
        command = "sh"
        args    = ["-c", "while sleep 10; do wget -qO- http://web.shop/; done"]
      }
    }
  }
}
