// Draws a picture, writes it, asks a question about it: both streams of enginecast.v1 from Go.
//
//	go run . -help
//	go run . -address 127.0.0.1:50051 -draw shapes-diffusion -ask shapes-vlm \
//	    -prompt "a large red circle at the top left on a white background" -question "what color is the circle?"
package main

//go:generate protoc -I../../proto --go_out=. --go-grpc_out=. --go_opt=module=enginecast --go-grpc_opt=module=enginecast --go_opt=Menginecast/v1/common.proto=enginecast/pb --go_opt=Menginecast/v1/image.proto=enginecast/pb --go_opt=Menginecast/v1/chat.proto=enginecast/pb --go-grpc_opt=Menginecast/v1/common.proto=enginecast/pb --go-grpc_opt=Menginecast/v1/image.proto=enginecast/pb --go-grpc_opt=Menginecast/v1/chat.proto=enginecast/pb enginecast/v1/common.proto enginecast/v1/image.proto enginecast/v1/chat.proto

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"enginecast/pb"
)

const longest = 64 << 20 // bytes of a message

type options struct {
	address, draw, ask, prompt, question, out, ca, token string
	steps                                                uint
}

func readOptions() options {
	var read options
	flag.StringVar(&read.address, "address", "127.0.0.1:50051", "server, HOST:PORT")
	flag.StringVar(&read.draw, "draw", "shapes-diffusion", "name of the model that draws")
	flag.StringVar(&read.ask, "ask", "shapes-vlm", "name of the model that is asked")
	flag.StringVar(&read.prompt, "prompt", "a large red circle at the top left on a white background", "what to draw")
	flag.StringVar(&read.question, "question", "what color is the circle?", "what to ask about the picture")
	flag.StringVar(&read.out, "out", "picture.png", "PNG file to write")
	flag.StringVar(&read.ca, "ca", "", "PEM file of the server's certificate authority; switches TLS on")
	flag.UintVar(&read.steps, "steps", 0, "denoising steps; without it, as many as the model usually takes")
	flag.Parse()
	read.token = os.Getenv("ENGINECAST_TOKEN")
	return read
}

// bearer sends a token with every call. gRPC refuses to send it without TLS.
type bearer string

func (token bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(token)}, nil
}

func (token bearer) RequireTransportSecurity() bool { return true }

func connect(wanted options) (*grpc.ClientConn, error) {
	sizes := grpc.MaxCallRecvMsgSize(longest)
	dialing := []grpc.DialOption{grpc.WithDefaultCallOptions(sizes, grpc.MaxCallSendMsgSize(longest))}
	if wanted.ca == "" {
		if wanted.token != "" {
			return nil, errors.New("a token is sent with TLS only: name the authority with -ca")
		}
		return grpc.Dial(wanted.address, append(dialing, grpc.WithInsecure())...)
	}
	trusted, err := credentials.NewClientTLSFromFile(wanted.ca, "")
	if err != nil {
		return nil, fmt.Errorf("-ca cannot be read: %w", err)
	}
	dialing = append(dialing, grpc.WithTransportCredentials(trusted))
	if wanted.token != "" {
		dialing = append(dialing, grpc.WithPerRPCCredentials(bearer(wanted.token)))
	}
	return grpc.Dial(wanted.address, dialing...)
}

func draw(ctx context.Context, images pb.ImageServiceClient, wanted options) ([]byte, error) {
	request := &pb.GenerateRequest{Model: wanted.draw, Prompt: wanted.prompt}
	if wanted.steps > 0 {
		steps := uint32(wanted.steps)
		request.Steps = &steps
	}
	stream, err := images.Generate(ctx, request)
	if err != nil {
		return nil, err
	}
	var png []byte
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return png, write(wanted.out, png)
		}
		if err != nil {
			return nil, err
		}
		if progress := response.GetProgress(); progress != nil {
			fmt.Fprintf(os.Stderr, "step %d of %d, %.1f s left\n", progress.Step, progress.Total, progress.EtaSeconds)
		}
		if image := response.GetImage(); image != nil {
			png = image.Png
			fmt.Fprintf(os.Stderr, "%dx%d, seed %d\n", image.Width, image.Height, image.Seed)
		}
	}
}

// write puts the whole file in place, or none.
func write(path string, data []byte) error {
	if err := os.WriteFile(path+".part", data, 0o644); err != nil {
		return err
	}
	if err := os.Rename(path+".part", path); err != nil {
		return err
	}
	fmt.Println(path)
	return nil
}

func ask(ctx context.Context, chats pb.ChatServiceClient, wanted options, png []byte) error {
	parts := []*pb.Part{
		{Content: &pb.Part_Image{Image: png}},
		{Content: &pb.Part_Text{Text: wanted.question}},
	}
	message := &pb.Message{Role: pb.Role_ROLE_USER, Parts: parts}
	stream, err := chats.Chat(ctx, &pb.ChatRequest{Model: wanted.ask, Messages: []*pb.Message{message}})
	if err != nil {
		return err
	}
	begun := false
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			fmt.Println()
			return nil
		}
		if err != nil {
			return err
		}
		text := response.GetDelta().GetText()
		if !begun {
			text = strings.TrimLeft(text, " \n") // answers of many models begin with a blank
		}
		begun = begun || text != ""
		fmt.Print(text)
	}
}

func run(ctx context.Context) error {
	wanted := readOptions()
	connection, err := connect(wanted)
	if err != nil {
		return err
	}
	defer connection.Close()
	png, err := draw(ctx, pb.NewImageServiceClient(connection), wanted)
	if err != nil {
		return err
	}
	return ask(ctx, pb.NewChatServiceClient(connection), wanted, png)
}

func main() {
	// Ctrl-C cancels the call, which stops the work on the server.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		text := err.Error()
		if refused, ok := status.FromError(err); ok {
			text = fmt.Sprintf("%v: %s", refused.Code(), refused.Message())
		}
		fmt.Fprintln(os.Stderr, "client:", text)
		os.Exit(1)
	}
}
